"""`deep_ep.Buffer` in normal mode: what Megatron-Core, torchtitan and SGLang rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from commlib.testing.spawn import check_ranks

pytestmark = pytest.mark.multirank


def check(function: str, num_ranks: int, tmp_path: Path, **options: Any) -> None:
    check_ranks(f"normal_job:{function}", num_ranks, args=[str(tmp_path / "store")], **options)


@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(1, None), (3, None), (4, 2)])
def test_dispatch_and_combine(num_ranks: int, ranks_per_node: int | None, tmp_path: Path) -> None:
    check("plain_rank", num_ranks, tmp_path, ranks_per_node=ranks_per_node)


@pytest.mark.parametrize(
    "function",
    ["layout_rank", "options_rank", "lifetimes_rank", "destroy_rank", "refused_rank"],
)
def test_with_two_ranks(function: str, tmp_path: Path) -> None:
    check(function, 2, tmp_path)


def test_groups_of_tensor_and_expert_parallel_ranks(tmp_path: Path) -> None:
    check("tensor_parallel_rank", 4, tmp_path)


def test_an_mpi_communicator_in_place_of_a_group() -> None:
    check_ranks("normal_job:mpi_rank", 2, launcher="mpirun")
