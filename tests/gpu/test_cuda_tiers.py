"""The GPU executor on several simulated nodes against the oracle, bit by bit: over TCP of this machine, with rings in
host memory; and by cuda_ipc, with rings in GPU memory, words and rows of the exchange over what else UCX has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commlib.testing.spawn import check_ranks

pytestmark = pytest.mark.gpu

SMALL = {"chunk_bytes": 4096, "ring_bytes": 16384}  # many rounds through every ring


# By where rings lie. "all" is what the Runtime chooses from without being told; on one host that has cuda_ipc.
ENVIRONMENTS = {
    "host": {"UCX_TLS": "tcp,self"},
    "device": {"UCX_TLS": "all", "COMMLIB_RING_MEMORY": "device"},
}
over_rings = pytest.mark.parametrize("rings", ["host", "device"])


def check(
    function: str, num_ranks: int, ranks_per_node: int, *args: Any, rings: str = "host", timeout_s: float = 150.0
) -> None:
    check_ranks(
        f"gpu.gpu_tiers_job:{function}",
        num_ranks,
        args=args,
        env=ENVIRONMENTS[rings],
        ranks_per_node=ranks_per_node,
        timeout_s=timeout_s,
    )


@over_rings
@pytest.mark.parametrize("ranks_per_node", [2, 1])
def test_every_workload_is_bitwise_what_the_oracle_says(ranks_per_node: int, rings: str) -> None:
    """4 ranks as 2 nodes of 2 and as 4 of 1."""
    check("plain_rank", 4, ranks_per_node, [], 256, 37, SMALL, rings=rings)


@pytest.mark.parametrize(
    ("choice", "tls", "expected"),
    [
        ("device", "all", "GPU memory"),
        ("device", "tcp,cuda_copy,self", "GPU memory"),
        ("host", "all", "pinned host memory"),
    ],
)
def test_where_rings_lie(choice: str, tls: str, expected: str) -> None:
    check_ranks(
        "gpu.gpu_tiers_job:rings_rank",
        2,
        args=[expected],
        env={"UCX_TLS": tls, "COMMLIB_RING_MEMORY": choice},
        ranks_per_node=1,
        timeout_s=150.0,
    )


def test_rings_of_one_runtime_after_the_other() -> None:
    """Also after one that was not closed cleanly."""
    check("rings_again_rank", 2, 1, rings="device")


@pytest.mark.skipif(torch.cuda.device_count() < 8, reason="two nodes of 4 want 8 GPUs")
def test_two_nodes_of_four() -> None:
    """Each rank has a GPU of its own."""
    check("plain_rank", 8, 4, [], 256, 37, SMALL)
    check("fp8_rank", 8, 4, ["masked", "uneven"], 384)
    check("bytes_rank", 8, 4)
    check("modes_rank", 8, 4)


def test_nodes_of_different_sizes() -> None:
    check("plain_rank", 3, 2, ["uniform", "masked"], 256, 37, SMALL)


def test_sums_of_the_own_node_behind_two_others() -> None:
    check("uneven_rank", 4, 1, [0, 1, 2, 2])


@over_rings
def test_several_proxy_threads(rings: str) -> None:
    check("plain_rank", 4, 1, ["uniform", "masked"], 256, 37, {**SMALL, "num_proxy_threads": 3}, rings=rings)


@over_rings
@pytest.mark.parametrize("ranks_per_node", [2, 1])
def test_several_blocks_at_a_ring(ranks_per_node: int, rings: str) -> None:
    """Of two nodes all at one ring, of four two each at two of the three."""
    blocks = {"num_sms": 12, "out_blocks": 5, "in_blocks": 5}
    check("plain_rank", 4, ranks_per_node, ["uniform", "masked"], 256, 101, {**SMALL, **blocks}, rings=rings)


def test_autograd() -> None:
    check("autograd_rank", 4, 2)


@over_rings
def test_wide_rows_and_many_blocks(rings: str) -> None:
    check("plain_rank", 4, 2, ["masked", "skewed"], 7168, 101, {"num_sms": 12}, rings=rings)


@over_rings
def test_fp8(rings: str) -> None:
    check("fp8_rank", 4, 2, ["masked", "uneven"], 384, rings=rings)


@over_rings
def test_bytes_are_the_lower_bound(rings: str) -> None:
    check("bytes_rank", 4, 2, rings=rings)


@over_rings
def test_modes(rings: str) -> None:
    check("modes_rank", 4, 2, rings=rings)


def test_forwarders_come_and_go_with_the_load() -> None:
    check("loads_rank", 4, 1)


@pytest.mark.parametrize("ranks_per_node", [2, 1])
def test_latency_regime(ranks_per_node: int) -> None:
    check("latency_rank", 2 * ranks_per_node, ranks_per_node)


@over_rings
@pytest.mark.parametrize("options", [[], ["--tune"]])
def test_bench(options: list[str], rings: str) -> None:
    check("bench_rank", 4, 2, ["--shapes", "256x1024", "--decode-tokens", "16", *options], rings=rings)


@over_rings
def test_a_rank_that_stays_away(rings: str) -> None:
    check("timeout_rank", 4, 2, rings=rings)


@over_rings
def test_a_rank_that_dies(rings: str) -> None:
    check("lost_rank", 4, 2, rings=rings)
