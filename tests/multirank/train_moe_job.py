"""What the ranks of test_train_moe_ranks.py run: a model small enough that rounding is all that can differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commlib import bootstrap
from examples.train_moe import checkpoint
from examples.train_moe.config import ModelConfig, TrainConfig
from examples.train_moe.data import held_out_windows
from examples.train_moe.parallel import by_expert, connect
from examples.train_moe.train import StepReport, Trainer

STEPS = 6
SAVE_AT = 3
MODEL = ModelConfig(
    hidden=32,
    num_layers=2,
    dense_width=48,
    num_heads=2,
    q_rank=16,
    kv_rank=16,
    nope_dim=8,
    rope_dim=8,
    v_dim=8,
    num_experts=8,
    num_topk=2,
    num_groups=4,
    max_groups=2,
    expert_width=16,
)
TRAINING = TrainConfig(steps=STEPS, warmup_steps=2, global_batch=8, seq_len=16, lr=1e-3, balance_alpha=1e-2)


def make_text(num_bytes: int, seed: int) -> Tensor:
    """Bytes that repeat with small changes, so that there is something to learn; uint8 [num_bytes]."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (num_bytes,), generator=generator)
    return (97 + steps.cumsum(0) % 26).to(torch.uint8)


@contextmanager
def joined() -> Iterator[bootstrap.Bootstrap]:
    """The other ranks, by commlib and by torch.distributed."""
    ranks = connect()
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
        ranks.close()


def make_trainer(ranks: bootstrap.Bootstrap) -> Trainer:
    """The same model on any number of ranks, all of it in FP32."""
    return Trainer(ranks, MODEL, TRAINING, make_text(2000, seed=0), torch.float32)


def straight(out: str) -> None:
    """All steps without a stop; a checkpoint on the way."""
    with joined() as ranks, make_trainer(ranks) as trainer:
        reports = list(trainer.train(SAVE_AT))
        checkpoint.save(trainer, Path(out) / "checkpoints")
        reports += trainer.train(STEPS)
        _write(trainer, reports, Path(out) / f"straight-{ranks.size}-{ranks.rank}.pt")


def resumed(out: str) -> None:
    """The steps after the checkpoint, in new processes."""
    with joined() as ranks, make_trainer(ranks) as trainer:
        found = checkpoint.latest(Path(out) / "checkpoints")
        assert found is not None
        checkpoint.load(trainer, found)
        _write(trainer, list(trainer.train(STEPS)), Path(out) / f"resumed-{ranks.size}-{ranks.rank}.pt")


def whole_model_is_causal() -> None:
    """Bytes after position t change neither what is predicted at t nor, after t + 1, what the MTP module predicts."""
    tokens = torch.randint(256, (8, 17), generator=torch.Generator().manual_seed(1))
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 256
    with joined() as ranks, make_trainer(ranks) as trainer:
        before, after = trainer.model(tokens), trainer.model(changed)
    torch.testing.assert_close(before.logits[:, :10], after.logits[:, :10])
    torch.testing.assert_close(before.mtp_logits[:, :9], after.mtp_logits[:, :9])
    assert not torch.allclose(before.logits[:, 10], after.logits[:, 10])
    assert not torch.allclose(before.mtp_logits[:, 9], after.mtp_logits[:, 9])


def _write(trainer: Trainer, reports: list[StepReport], path: Path) -> None:
    """Reports, and all that training carries from step to step, by global name."""
    trainer.ema.wait()
    groups = {
        "model": trainer.model.state_dict(),
        "first_moment": trainer.optimizer.first,
        "second_moment": trainer.optimizer.second,
        "ema": trainer.ema.average,
    }
    state = {
        f"{group}.{name}": tensor.clone()
        for group, tensors in groups.items()
        for name, tensor in by_expert(tensors, trainer.first_expert)
    }
    state["data"] = trainer.batches.state()
    held_out = trainer.held_out_loss(held_out_windows(make_text(16 * 11 + 1, seed=9), TRAINING.seq_len))
    steps: list[dict[str, Any]] = [report._replace(seconds=0.0)._asdict() for report in reports]
    torch.save({"steps": steps, "state": state, "held_out": held_out}, path)
