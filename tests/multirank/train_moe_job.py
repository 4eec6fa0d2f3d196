"""What the ranks of test_train_moe_ranks.py run: a model small enough that rounding is all that can differ."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from commlib import bootstrap
from commlib.testing import torch_exchange
from examples.train_moe import checkpoint, compare_dispatch
from examples.train_moe.config import ModelConfig, ParallelConfig, TrainConfig
from examples.train_moe.data import held_out_windows
from examples.train_moe.parallel import as_global, by_expert, connect
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
def joined(device: str = "cpu") -> Iterator[bootstrap.Bootstrap]:
    """The other ranks, by commlib and by torch.distributed."""
    ranks = connect(device)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
        ranks.close()


def make_trainer(ranks: bootstrap.Bootstrap, device: str = "cpu", **parallel: Any) -> Trainer:
    """The same model on any number of ranks, all of it in FP32."""
    text = make_text(2000, seed=0)
    return Trainer(ranks, MODEL, TRAINING, text, torch.float32, ParallelConfig(**parallel), device)


def straight(out: str, device: str = "cpu") -> None:
    """All steps without a stop; a checkpoint on the way."""
    with joined(device) as ranks, make_trainer(ranks, device) as trainer:
        reports = list(trainer.train(SAVE_AT))
        checkpoint.save(trainer, Path(out) / "checkpoints")
        reports += trainer.train(STEPS)
        _write(trainer, reports, Path(out) / f"straight-{ranks.size}-{ranks.rank}.pt")


def resumed(out: str, device: str = "cpu") -> None:
    """The steps after the checkpoint, in new processes."""
    with joined(device) as ranks, make_trainer(ranks, device) as trainer:
        found = checkpoint.latest(Path(out) / "checkpoints")
        assert found is not None
        checkpoint.load(trainer, found)
        _write(trainer, list(trainer.train(STEPS)), Path(out) / f"resumed-{ranks.size}-{ranks.rank}.pt")


def by_torch(out: str) -> None:
    """All steps with torch.distributed in commlib's place."""
    with joined() as ranks, make_trainer(ranks, exchange="torch") as trainer:
        _write(trainer, list(trainer.train(STEPS)), Path(out) / f"torch-{ranks.size}-{ranks.rank}.pt")
        assert not trainer.runtime.counters()["roles"], "commlib has moved rows"


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


def ways(out: str) -> None:
    """Three steps in every way to lay micro-batches side by side: the same bits, with and without sharding."""
    with joined() as ranks:
        for parallel in ({}, {"ep_ranks": 2, "shard_dense": True}):
            expected: dict[str, Tensor] = {}
            for way in ("none", "batches", "pairs"):
                with make_trainer(ranks, micro_batches=2, overlap=way, **parallel) as trainer:
                    reports = list(trainer.train(3))
                    state = state_of(trainer)
                    kind = "sharded" if parallel else "whole"
                    if way == "none":
                        expected = state
                        _write(trainer, reports, Path(out) / f"{kind}-{ranks.size}-{ranks.rank}.pt")
                for name, tensor in state.items():
                    assert torch.equal(tensor, expected[name]), f"{kind}, {way}: {name}"


def compared(device: str) -> None:
    """All ways of compare_dispatch, with heads whose values are narrower than their keys."""
    compare_dispatch.main(["--device", device, "--tokens", "64", "--v-dim", "16", "--turns", "1"])


def compared_with_wrong_gradients(name: str) -> None:
    """Where one way has a wrong gradient, compare_dispatch measures nothing: torch's all-to-all brings gradients home
    5% too large, or one gradient of the overlapped way is off by its last bit.
    """
    way = {"torch": compare_dispatch.TORCH, "overlapped": compare_dispatch.BF16_OVERLAPPED}[name]
    whole, back = compare_dispatch.Comparison._results, torch_exchange._AllToAll.backward

    def off_by_a_bit(comparison: compare_dispatch.Comparison, each: compare_dispatch.Way) -> dict[str, Tensor]:
        found = whole(comparison, each)
        if each == way:
            gradient = found["blocks.0.ffn.experts.up"].view(-1)
            place = gradient.abs().argmax()
            gradient[place] = torch.nextafter(gradient[place], torch.zeros(()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        if name == "torch":
            patch.setattr(torch_exchange._AllToAll, "backward", staticmethod(lambda ctx, grad: back(ctx, 1.05 * grad)))
        else:
            patch.setattr(compare_dispatch.Comparison, "_results", off_by_a_bit)
        patch.setattr(compare_dispatch.Comparison, "measure", lambda comparison: pytest.fail("nothing was noticed"))
        with pytest.raises(AssertionError, match=f"{way.name}, against {compare_dispatch.BF16.name}"):
            compare_dispatch.main(["--tokens", "32"])


def saved_in_background(out: str) -> None:
    """With sharded dense parameters: a checkpoint while training goes on, and one more run from there."""
    with joined() as ranks:
        with make_trainer(ranks, shard_dense=True) as trainer:
            list(trainer.train(SAVE_AT))
            expected_start = state_of(trainer)
            saver = checkpoint.BackgroundSaver()
            directory = saver.start(trainer, Path(out) / "checkpoints")
            reports = list(trainer.train(STEPS))
            saver.wait()
            sharded = [name for name, each in trainer.parameters.items() if isinstance(each, DTensor)]
            assert len(sharded) == 3 * (7 + 3) + 3, "MLA and SwiGLU of three blocks, embedding, head, MTP projection"
            _write(trainer, reports, Path(out) / f"straight-{ranks.size}-{ranks.rank}.pt")
        with make_trainer(ranks, shard_dense=True) as trainer:
            checkpoint.load(trainer, directory)
            for name, tensor in state_of(trainer).items():
                assert torch.equal(tensor, expected_start[name]), f"the copy of {name} was taken too late"
            _write(trainer, [], Path(out) / f"start-{ranks.size}-{ranks.rank}.pt")
            _write(trainer, list(trainer.train(STEPS)), Path(out) / f"resumed-{ranks.size}-{ranks.rank}.pt")


def loaded_by_fewer(out: str) -> None:
    """The same checkpoint on another number of ranks, in rows that repeat each other."""
    with joined() as ranks, make_trainer(ranks, ep_ranks=2, shard_dense=True) as trainer:
        found = checkpoint.latest(Path(out) / "checkpoints")
        assert found is not None
        checkpoint.load(trainer, found)
        _write(trainer, [], Path(out) / f"start-{ranks.size}-{ranks.rank}.pt")
        _write(trainer, list(trainer.train(STEPS)), Path(out) / f"resumed-{ranks.size}-{ranks.rank}.pt")


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """All that training carries from step to step, by global name; sharded tensors are joined."""
    trainer.ema.wait()
    groups = {
        "model": trainer.model.state_dict(),
        "first_moment": trainer.optimizer.first,
        "second_moment": trainer.optimizer.second,
        "ema": trainer.ema.average,
    }
    state = {}
    for group, tensors in groups.items():
        for name, tensor in by_expert(tensors, trainer.first_expert):
            if name in trainer.parameters and group != "model":
                tensor = as_global(tensor, trainer.parameters[name], trainer.grid.mesh)
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            state[f"{group}.{name}"] = whole.clone()
    state["data"] = trainer.batches.state()
    return state


def _write(trainer: Trainer, reports: list[StepReport], path: Path) -> None:
    """Reports, state and held-out loss."""
    held_out = trainer.held_out_loss(held_out_windows(make_text(16 * 11 + 1, seed=9), TRAINING.seq_len))
    steps: list[dict[str, Any]] = [report._replace(seconds=0.0)._asdict() for report in reports]
    torch.save({"steps": steps, "state": state_of(trainer), "held_out": held_out}, path)
