"""The tests of tests/compat on CUDA tensors: the same jobs, told another device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from commlib.testing.spawn import check_ranks

pytestmark = pytest.mark.gpu

JOBS = [
    "normal_job:plain_rank",
    "normal_job:options_rank",
    "normal_job:lifetimes_rank",
    "normal_job:destroy_rank",
    "low_latency_job:plain_rank",
    "low_latency_job:hooks_rank",
    "low_latency_job:formats_rank",
    "elastic_job:plain_rank",
    "elastic_job:options_rank",
    "hybrid_job:plain_rank",
    "hybrid_job:uneven_maps_rank",
    "hybrid_job:limit_rank",
]


@pytest.mark.parametrize("job", JOBS)
def test_against_the_oracle(job: str, tmp_path: Path) -> None:
    check_ranks(f"compat.{job}", 2, args=[str(tmp_path / "store"), "cuda"])


@pytest.mark.parametrize("job", ["torchtitan_job:first_version_rank", "torchtitan_job:second_version_rank"])
def test_torchtitan(job: str, tmp_path: Path) -> None:
    check_ranks(f"compat.{job}", 2, args=[str(tmp_path / "store"), "cuda"])


@pytest.mark.parametrize(
    ("job", "num_ranks"),
    [("layer_rank", 2), ("layer_rank", 4), ("pipeline_rank", 2), ("tensor_parallel_rank", 4)],
)
def test_megatron(job: str, num_ranks: int, tmp_path: Path) -> None:
    """Its own dispatchers need NCCL, which wants a GPU for every rank."""
    assert torch.cuda.device_count() >= num_ranks
    check_ranks(f"compat.megatron_job:{job}", num_ranks, args=[str(tmp_path / "store"), "cuda"])
