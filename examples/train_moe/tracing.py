"""A trace of a few steps: `trace.json` for Perfetto, `trace.png`, and how much communication lay under computation."""

from __future__ import annotations

import time
from pathlib import Path

import torch.distributed as dist

from commlib.trace import describe_overlap, write_trace
from commlib.trace.spans import Span
from commlib.trace.timeline import plot_timeline
from examples.train_moe.train import Trainer


class StepTrace:
    """Traces `num_steps` steps from the second of a run on: the first one warms up."""

    def __init__(self, trainer: Trainer, num_steps: int, folder: Path) -> None:
        self._runtime, self._folder = trainer.runtime, folder
        self._left = num_steps
        self._origin_s = 0.0

    def after_step(self) -> None:
        """Between steps; collective."""
        if self._runtime.trace is not None:
            self._left -= 1
            if self._left == 0:
                self.finish()
        elif self._left > 0:
            self._runtime.start_trace()
            dist.barrier()
            # Clocks of hosts are unrelated: this moment, the same for all to within a barrier, is zero.
            self._origin_s = time.monotonic()

    def finish(self) -> None:
        """Writes what there is; collective."""
        if self._runtime.trace is None:
            return
        mine = [
            span._replace(begin_s=span.begin_s - self._origin_s, end_s=span.end_s - self._origin_s)
            for span in self._runtime.take_trace()
        ]
        gathered: list[list[Span]] = [[] for _ in range(dist.get_world_size())]
        dist.gather_object(mine, gathered if dist.get_rank() == 0 else None)
        if dist.get_rank() == 0:
            ranks = dict(enumerate(gathered))
            write_trace(ranks, self._folder / "trace.json")
            plot_timeline(ranks, self._folder / "trace.png")
            print(f"{describe_overlap(ranks)}\ntrace: {self._folder / 'trace.json'}, {self._folder / 'trace.png'}")
