"""Progress on rank 0: a bar on a terminal, a line every few steps anywhere else."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from examples.train_moe.config import TrainConfig
from examples.train_moe.train import StepReport


class Progress:
    """Shows loss, tokens per second (all ranks together) and expert load; `is_shown` on one rank only."""

    def __init__(self, config: TrainConfig, first_step: int, until_step: int, *, is_shown: bool, every: int) -> None:
        self._is_shown = is_shown
        self._every = every
        self._until = until_step
        self._tokens_per_step = config.global_batch * config.seq_len
        self._since = time.perf_counter()
        self._steps = 0
        is_bar = is_shown and sys.stderr.isatty()
        self._bar = tqdm(total=until_step, initial=first_step, unit="step") if is_bar else None

    def show(self, report: StepReport) -> None:
        """Called after every step."""
        if not self._is_shown:
            return
        self._steps += 1
        done = report.step + 1
        if self._bar is not None:
            self._bar.update()
        if self._steps < self._every and done != self._until and report.step != 0:
            return
        now = time.perf_counter()
        rate = self._steps * self._tokens_per_step / (now - self._since)
        self._since, self._steps = now, 0
        values = (
            f"loss {report.main:.3f}  mtp {report.mtp:.3f}  |grad| {report.grad_norm:.2f}  "
            f"{rate:,.0f} tokens/s  expert load max/mean {1 + report.max_violation:.2f}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(values)
        else:
            print(f"step {done:5d}/{self._until}  {values}", flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self._bar is not None:
            self._bar.close()
