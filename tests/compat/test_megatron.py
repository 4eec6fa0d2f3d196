"""Megatron-Core from PyPI on commlib: `moe_token_dispatcher_type="flex"` gives what its own dispatchers give."""

from __future__ import annotations

from pathlib import Path

import pytest

from commlib.testing.spawn import check_ranks

pytestmark = pytest.mark.multirank


def check(function: str, num_ranks: int, tmp_path: Path) -> None:
    check_ranks(f"megatron_job:{function}", num_ranks, args=[str(tmp_path / "store")])


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_moe_layer(num_ranks: int, tmp_path: Path) -> None:
    check("layer_rank", num_ranks, tmp_path)


def test_batches_in_flight(tmp_path: Path) -> None:
    check("pipeline_rank", 2, tmp_path)


def test_tensor_parallel_experts(tmp_path: Path) -> None:
    check("tensor_parallel_rank", 4, tmp_path)
