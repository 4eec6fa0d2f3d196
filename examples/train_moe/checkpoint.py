"""Save and resume, bit for bit, with torch.distributed.checkpoint.

Everything the next step depends on is in: weights, gate biases, both moments, the average, the number of steps, the
data order's generator (the only source of randomness). Experts are keyed by their global number and written by a rank
that holds them; sharded tensors are written in parts and cut anew when they are read; all others are the same
everywhere and written once. Hence a checkpoint of 8 ranks loads on 4 or on 1, sharded or not.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from examples.train_moe.parallel import as_global, by_expert

if TYPE_CHECKING:
    from examples.train_moe.train import Trainer


def save(trainer: Trainer, root: Path) -> Path:
    """Writes `root/step-<number of steps>`; collective. Returns the directory."""
    directory = _directory(trainer, root)
    dcp_save(_state(trainer), checkpoint_id=directory)
    return directory


class BackgroundSaver:
    """Writes checkpoints while training goes on: only the copy of the state is waited for. Collective."""

    def __init__(self) -> None:
        # The writing threads of all ranks talk to each other beside the training's own collectives.
        self._group = dist.new_group(backend="gloo")
        self._under_way: Future[Any] | None = None

    def start(self, trainer: Trainer, root: Path) -> Path:
        """Begins to write what the trainer is now; waits for the checkpoint before. Returns the directory."""
        self.wait()
        directory = _directory(trainer, root)
        started = dcp_async_save(_state(trainer), checkpoint_id=directory, process_group=self._group)
        assert isinstance(started, Future)
        self._under_way = started
        return directory

    def wait(self) -> None:
        """Returns once the last checkpoint is complete; raises what went wrong with it."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()


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


def _directory(trainer: Trainer, root: Path) -> Path:
    return root / f"step-{trainer.optimizer.num_steps:06d}"


def _state(trainer: Trainer) -> dict[str, Tensor]:
    """Global name -> tensor; what the optimizer and the model own appears as views."""
    trainer.ema.wait()
    mesh, host_mesh = trainer.grid.mesh, trainer.grid.host_mesh
    groups = {
        "model": {name: tensor.detach() for name, tensor in trainer.model.state_dict().items()},
        "first_moment": _globally(trainer.optimizer.first, trainer.parameters, mesh),
        "second_moment": _globally(trainer.optimizer.second, trainer.parameters, mesh),
        "ema": _globally(trainer.ema.average, trainer.parameters, host_mesh),
    }
    state = {
        f"{group}.{name}": tensor
        for group, tensors in groups.items()
        for name, tensor in by_expert(tensors, trainer.first_expert)
    }
    state["progress.num_steps"] = torch.tensor(trainer.optimizer.num_steps)
    state["progress.data"] = trainer.batches.state()
    return state


def _globally(parts: dict[str, Tensor], like: dict[str, Tensor], mesh: Any) -> dict[str, Tensor]:
    return {name: as_global(part, like[name], mesh) for name, part in parts.items()}
