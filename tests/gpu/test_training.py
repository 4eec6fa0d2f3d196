"""examples/train_moe on GPUs, one for each rank: NCCL wants that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from multirank.train_moe_runs import assert_same_to_rounding, read

from commlib.testing.spawn import check_ranks
from examples.train_moe import compare_dispatch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_half_the_ranks_go_on_from_a_checkpoint(num_ranks: int, tmp_path: Path) -> None:
    """The same model on the CPU, on all ranks and, from the checkpoint, on all and on half of them."""
    if torch.cuda.device_count() < num_ranks:
        pytest.skip(f"{num_ranks} ranks want as many GPUs")
    folder, on_cpu = tmp_path / "gpu", tmp_path / "cpu"
    for each in (folder, on_cpu):
        each.mkdir()
    check_ranks("multirank.train_moe_job:straight", num_ranks, args=[str(on_cpu)])
    check_ranks("multirank.train_moe_job:straight", num_ranks, args=[str(folder), "cuda"])
    straight = read(folder, "straight", num_ranks)
    assert_same_to_rounding(straight, read(on_cpu, "straight", num_ranks), first_step=0)
    for size in (num_ranks, num_ranks // 2):
        check_ranks("multirank.train_moe_job:resumed", size, args=[str(folder), "cuda"])
        assert_same_to_rounding(read(folder, "resumed", size), straight, first_step=3)


def test_whole_steps_are_compared() -> None:
    """Of what is measured on GPUs, a small one: gradients of all ways are compared inside."""
    if torch.cuda.device_count() < 2:
        pytest.skip("2 ranks want as many GPUs")
    results = check_ranks("multirank.train_moe_job:compared", 2, args=["cuda"], timeout_s=240)
    for way in compare_dispatch.WAYS:
        assert f"\n{way.name} " in results[0].stdout, results[0].stdout
