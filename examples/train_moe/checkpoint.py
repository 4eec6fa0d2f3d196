"""Save and resume, bit for bit, with torch.distributed.checkpoint.

Everything the next step depends on is in: weights, gate biases, both moments, the average, the number of steps, the
data order's generator (the only source of randomness). Experts are keyed by their global number and written by the rank
that holds them; dense tensors are the same everywhere and written once. Hence a checkpoint of 4 ranks loads on 1 or 2.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from examples.train_moe.parallel import by_expert

if TYPE_CHECKING:
    from examples.train_moe.train import Trainer


def save(trainer: Trainer, root: Path) -> Path:
    """Writes `root/step-<number of steps>`; collective. Returns the directory."""
    directory = root / f"step-{trainer.optimizer.num_steps:06d}"
    dcp_save(_state(trainer), checkpoint_id=directory)
    return directory


def load(trainer: Trainer, directory: Path) -> None:
    """Continues from what `save` wrote; collective."""
    state = _state(trainer)
    dcp_load(state, checkpoint_id=directory)  # in place: all but the two small ones are views of the live tensors
    trainer.optimizer.num_steps = int(state["progress.num_steps"])
    trainer.batches.restore(state["progress.data"])


def latest(root: Path) -> Path | None:
    """The complete checkpoint of most steps under `root`, as rank 0 sees it; collective."""
    found: list[Path | None] = [None]
    if dist.get_rank() == 0:
        # .metadata is written last: a directory without it is an interrupted save.
        found = [max((path.parent for path in root.glob("step-*/.metadata")), default=None)]
    dist.broadcast_object_list(found)
    return found[0]


def discard(root: Path) -> None:
    """Removes the checkpoints of an earlier run, which a later `latest` would take for this one's; collective."""
    if dist.get_rank() == 0:
        for directory in root.glob("step-*"):
            shutil.rmtree(directory)
    dist.barrier()


def _state(trainer: Trainer) -> dict[str, Tensor]:
    """Global name -> tensor; what the optimizer and the model own appears as views."""
    trainer.ema.wait()
    groups = {
        "model": {name: tensor.detach() for name, tensor in trainer.model.state_dict().items()},
        "first_moment": trainer.optimizer.first,
        "second_moment": trainer.optimizer.second,
        "ema": trainer.ema.average,
    }
    state = {
        f"{group}.{name}": tensor
        for group, tensors in groups.items()
        for name, tensor in by_expert(tensors, trainer.first_expert)
    }
    state["progress.num_steps"] = torch.tensor(trainer.optimizer.num_steps)
    state["progress.data"] = trainer.batches.state()
    return state
