"""examples/train_moe on GPUs, one for each rank: NCCL wants that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from multirank.train_moe_runs import assert_same_to_rounding, read

from commlib.testing.spawn import check_ranks

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
