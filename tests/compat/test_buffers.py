"""All kinds of buffers of `deep_ep` on real ranks, against the oracle: what Megatron-Core, torchtitan, DeepSpeed, vLLM
and SGLang rely on.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from commlib.testing.spawn import check_ranks

pytestmark = pytest.mark.multirank


def check(targets: list[str], num_ranks: int, tmp_path: Path, ranks_per_node: int | None = None) -> None:
    args = [str(tmp_path / "store"), "cpu", *targets]
    check_ranks("compat.compat_job:several", num_ranks, args=args, ranks_per_node=ranks_per_node)


@pytest.mark.parametrize("job", ["normal_job", "low_latency_job", "elastic_job", "hybrid_job"])
def test_two_nodes_of_two_ranks(job: str, tmp_path: Path) -> None:
    check([f"{job}:plain_rank"], 4, tmp_path, ranks_per_node=2)


def test_an_odd_number_of_ranks(tmp_path: Path) -> None:
    check(["normal_job:plain_rank", "elastic_job:plain_rank"], 3, tmp_path)


def test_one_rank_alone(tmp_path: Path) -> None:
    check([f"{job}:plain_rank" for job in ("normal_job", "low_latency_job", "elastic_job")], 1, tmp_path)


@pytest.mark.parametrize(
    ("job", "functions"),
    [
        ("normal_job", ["layout_rank", "options_rank", "lifetimes_rank", "destroy_rank", "refused_rank"]),
        ("low_latency_job", ["hooks_rank", "formats_rank", "masks_rank"]),
        ("elastic_job", ["worst_rank", "options_rank"]),
        ("hybrid_job", ["uneven_maps_rank", "limit_rank", "formats_rank"]),
    ],
)
def test_with_two_ranks(job: str, functions: list[str], tmp_path: Path) -> None:
    check([f"{job}:{function}" for function in functions], 2, tmp_path)


def test_groups_of_tensor_and_expert_parallel_ranks(tmp_path: Path) -> None:
    check(["normal_job:tensor_parallel_rank"], 4, tmp_path)


def test_an_mpi_communicator_in_place_of_a_group() -> None:
    check_ranks("compat.normal_job:mpi_rank", 2, launcher="mpirun")
