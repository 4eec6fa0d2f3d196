"""Exponential moving average of the weights, kept in CPU memory and computed beside the next step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from examples.train_moe.parallel import local


class Ema:
    """`average = decay * average + (1 - decay) * weights` after every step, in a thread of its own.

    Weights stand still from one optimizer step to the next, so the thread reads them during the forward and backward
    pass, without a copy. Of sharded parameters each rank averages its part. The contract: `update()` after an optimizer
    step, `wait()` before the next one. Nothing is kept where `decay` is 0: the average is the weights.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        averaged = parameters if decay else {}
        self._parts = {name: local(parameter.detach()) for name, parameter in averaged.items()}
        self._decay = decay
        self.average = {name: part.to("cpu", torch.float32, copy=True) for name, part in self._parts.items()}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._pending: Future[None] | None = None

    def update(self) -> None:
        """Starts taking the current weights in; returns at once."""
        self.wait()
        self._pending = self._thread.submit(self._take_in)

    def wait(self) -> None:
        """Returns once the average is complete; raises what the thread raised."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own, bit for bit."""
        self.wait()
        own = {name: part.clone() for name, part in self._parts.items()}
        self._write(self.average)
        try:
            yield
        finally:
            self._write(own)

    def close(self) -> None:
        """Ends the thread."""
        self.wait()
        self._thread.shutdown()

    @torch.no_grad()
    def _take_in(self) -> None:
        for name, part in self._parts.items():
            self.average[name].lerp_(part.to("cpu", torch.float32), 1 - self._decay)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, part in self._parts.items():
            part.copy_(values[name])
