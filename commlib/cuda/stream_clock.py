"""Times of a trace on a GPU: events in the streams, read when all work is done."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from commlib.trace import Clock, Span, lane_of

__all__ = ["StreamClock", "spans_of_marks"]


class StreamClock:
    """`commlib.trace.Clock` of the current stream of a device. Construction waits for the device."""

    def __init__(self, device: Any) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        self._origin, self._origin_s = self.mark(), time.monotonic()

    def mark(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return torch.cuda.current_stream(self._device).record_event(event)

    def seconds(self, mark: Any) -> float:
        return self._origin_s + float(self._origin.elapsed_time(mark)) / 1e3


def spans_of_marks(marks: Iterable[tuple[str, Any, Any]], clock: Clock) -> list[Span]:
    """Of the kernels that `OpQueue.marks` has: name, events at start and end."""
    return [
        Span(lane, name, clock.seconds(begin), clock.seconds(end))
        for name, begin, end in marks
        if (lane := lane_of(name)) is not None
    ]
