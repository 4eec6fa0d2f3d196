"""Ways to call the GPU executor. Ranks share a GPU where there are fewer GPUs than ranks."""

from __future__ import annotations

import pytest
import torch
from gpu.gpu_ranks import ranks
from test_cuda_engine import check

from commlib.testing.spawn import run_ranks

pytestmark = pytest.mark.gpu

JOB = "gpu.gpu_modes_job"


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_heaps_grow(num_ranks: int) -> None:
    check("growth_rank", num_ranks, job=JOB)


@pytest.mark.parametrize("num_ranks", ranks(1, 2, 4))
def test_fixed_capacity(num_ranks: int) -> None:
    check("capacity_rank", num_ranks, job=JOB)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_graphs(num_ranks: int) -> None:
    check("graph_rank", num_ranks, job=JOB)


@pytest.mark.parametrize("num_ranks", ranks(1, 2, 4))
def test_latency_regime(num_ranks: int) -> None:
    check("latency_rank", num_ranks, job=JOB)


@pytest.mark.parametrize("num_ranks", ranks(1, 3))
def test_autograd(num_ranks: int) -> None:
    check("autograd_rank", num_ranks, job=JOB)


@pytest.mark.parametrize("num_ranks", ranks(2, 4))
def test_shapes(num_ranks: int) -> None:
    check("shapes_rank", num_ranks, job="gpu.gpu_shapes_job", timeout_s=240.0)


def test_latency_shapes() -> None:
    check("latency_shapes_rank", 2, job="gpu.gpu_shapes_job")


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_orders_of_halves(num_ranks: int) -> None:
    check("orders_rank", num_ranks, job="gpu.gpu_shapes_job")


def test_beside_nccl() -> None:
    check("nccl_rank", torch.cuda.device_count(), job=JOB)


def test_a_rank_that_is_killed() -> None:
    results = run_ranks(f"{JOB}:killed_rank", 3, timeout_s=100.0)
    assert [result.returncode for result in results] == [0, 0, -9], results
    assert all("killed OK" in result.stdout for result in results[:2])
