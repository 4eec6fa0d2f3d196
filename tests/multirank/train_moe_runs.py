"""What jobs of train_moe_job.py have written, and how runs are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

__all__ = ["Run", "assert_same_state", "assert_same_step", "assert_same_to_rounding", "read"]


class Run(NamedTuple):
    """What a job wrote: per-step reports, the union of all ranks' tensors, the held-out loss."""

    steps: list[dict[str, Any]]
    state: dict[str, Tensor]
    held_out: float


def read(folder: Path, kind: str, num_ranks: int) -> Run:
    """Joins the ranks' files; where several ranks hold a tensor, they must hold the same bits."""
    parts = [torch.load(folder / f"{kind}-{num_ranks}-{rank}.pt", map_location="cpu") for rank in range(num_ranks)]
    state: dict[str, Tensor] = {}
    for part in parts:
        assert part["held_out"] == parts[0]["held_out"]
        for name, tensor in part["state"].items():
            assert torch.equal(tensor, state.setdefault(name, tensor)), f"{name} differs between ranks"
        for ours, theirs in zip(part["steps"], parts[0]["steps"], strict=True):
            assert_same_step(ours, theirs)
    return Run(parts[0]["steps"], state, parts[0]["held_out"])


def assert_same_step(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Bit for bit."""
    assert torch.equal(ours["load"], theirs["load"])
    assert {**ours, "load": None} == {**theirs, "load": None}


def assert_same_state(ours: Run, theirs: Run, *, with_held_out: bool = True) -> None:
    """Bit for bit."""
    assert ours.state.keys() == theirs.state.keys()
    for name, tensor in ours.state.items():
        assert torch.equal(tensor, theirs.state[name]), name
    assert not with_held_out or ours.held_out == theirs.held_out


def assert_same_to_rounding(ours: Run, theirs: Run, first_step: int) -> None:
    """FP32 sums in another order: measured, losses differ by 1e-7 and weights by 4e-5 of what six steps can move them.

    A wrong factor in the gradients of experts or dense parts shows in the first digits of the gradient norm.
    """
    for mine, other in zip(ours.steps, theirs.steps[first_step:], strict=True):
        assert torch.equal(mine["load"], other["load"])
        for name in ("main", "mtp", "balance", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=2e-6), (mine["step"], name)
    assert ours.held_out == pytest.approx(theirs.held_out, rel=2e-6)
    assert ours.state.keys() == theirs.state.keys()
    for name, tensor in ours.state.items():
        if name.startswith("model."):
            # Six steps of at most 1e-3 each.
            assert float((tensor - theirs.state[name]).norm()) <= 1e-3 * 6e-3 * tensor.numel() ** 0.5, name
