"""The GPU executor on several simulated nodes against the oracle, bit by bit, over TCP of this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from commlib.testing.spawn import check_ranks

pytestmark = pytest.mark.gpu

SMALL = {"chunk_bytes": 4096, "ring_bytes": 16384}  # many rounds through every ring


def check(function: str, num_ranks: int, ranks_per_node: int, *args: Any, timeout_s: float = 150.0) -> None:
    check_ranks(
        f"gpu.gpu_tiers_job:{function}",
        num_ranks,
        args=args,
        env={"UCX_TLS": "tcp,self"},
        ranks_per_node=ranks_per_node,
        timeout_s=timeout_s,
    )


@pytest.mark.parametrize("ranks_per_node", [2, 1])
def test_every_workload_is_bitwise_what_the_oracle_says(ranks_per_node: int) -> None:
    """4 ranks as 2 nodes of 2 and as 4 of 1."""
    check("plain_rank", 4, ranks_per_node, [], 256, 37, SMALL)


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


def test_several_proxy_threads() -> None:
    check("plain_rank", 4, 1, ["uniform", "masked"], 256, 37, {**SMALL, "num_proxy_threads": 3})


def test_autograd() -> None:
    check("autograd_rank", 4, 2)


def test_wide_rows_and_many_blocks() -> None:
    check("plain_rank", 4, 2, ["masked", "skewed"], 7168, 101, {"num_sms": 12})


def test_fp8() -> None:
    check("fp8_rank", 4, 2, ["masked", "uneven"], 384)


def test_bytes_are_the_lower_bound() -> None:
    check("bytes_rank", 4, 2)


def test_modes() -> None:
    check("modes_rank", 4, 2)


@pytest.mark.parametrize("ranks_per_node", [2, 1])
def test_latency_regime(ranks_per_node: int) -> None:
    check("latency_rank", 2 * ranks_per_node, ranks_per_node)


@pytest.mark.parametrize("options", [[], ["--tune"]])
def test_bench(options: list[str]) -> None:
    check("bench_rank", 4, 2, ["--shapes", "256x1024", "--decode-tokens", "16", *options])


def test_a_rank_that_stays_away() -> None:
    check("timeout_rank", 4, 2)


def test_a_rank_that_dies() -> None:
    check("lost_rank", 4, 2)
