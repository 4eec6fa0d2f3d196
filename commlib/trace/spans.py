"""What a trace is made of."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["COMMUNICATION", "LANES", "Span", "lane_of"]

COMMUNICATION = ("dispatch", "forward", "combine")
LANES = ("step", "compute", *COMMUNICATION)

# Roles of the native core and kernels of the GPU that pass rows on between nodes.
_FORWARDING = ("forward", "forward_reduce")


class Span(NamedTuple):
    """Something that happened on one lane of a rank; seconds of the rank's own clock."""

    lane: str
    name: str
    begin_s: float
    end_s: float


def lane_of(name: str) -> str | None:
    """The lane of an operation, a role or a kernel; None of what only serves others."""
    if name in _FORWARDING:
        return "forward"
    return next((lane for lane in ("dispatch", "combine") if lane in name), None)
