"""How long something takes on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["microseconds"]


def microseconds(call: Callable[[], Any]) -> float:
    """The median of ten calls between events, after one that does not count."""
    call()
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return sorted(times)[5]
