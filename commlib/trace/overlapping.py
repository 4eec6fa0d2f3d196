"""How much of the communication lies under computation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from commlib.trace.spans import COMMUNICATION, Span

__all__ = ["Overlap", "describe_overlap", "overlap_of"]

_Interval = tuple[float, float]


class Overlap(NamedTuple):
    """Seconds of one rank: some operation was under way; of these, while the rank computed."""

    communication_s: float
    hidden_s: float

    @property
    def fraction(self) -> float:
        """Part of the communication that lies under computation; 1 if there was none."""
        return self.hidden_s / self.communication_s if self.communication_s else 1.0


def overlap_of(spans: Iterable[Span]) -> Overlap:
    """Of one rank's spans, whatever the steps they belong to. Spans that lie upon one another count once."""
    spans = list(spans)
    communication = _union((each.begin_s, each.end_s) for each in spans if each.lane in COMMUNICATION)
    compute = _union((each.begin_s, each.end_s) for each in spans if each.lane == "compute")
    return Overlap(sum(end - begin for begin, end in communication), _common_s(communication, compute))


def describe_overlap(ranks: Mapping[int, Iterable[Span]]) -> str:
    """Of all ranks together, and of each."""
    overlaps = {rank: overlap_of(spans) for rank, spans in sorted(ranks.items())}
    whole = Overlap(*(sum(column) for column in zip(*overlaps.values(), strict=True)))
    each = ", ".join(f"rank {rank} {100 * overlap.fraction:.1f}%" for rank, overlap in overlaps.items())
    return (
        f"overlap: {100 * whole.fraction:.1f}% of {1e3 * whole.communication_s:.1f} ms of communication lay under "
        f"computation ({each})"
    )


def _union(intervals: Iterable[_Interval]) -> list[_Interval]:
    merged: list[_Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged


def _common_s(ours: list[_Interval], theirs: list[_Interval]) -> float:
    """Length of what two sorted lists of disjoint intervals have in common."""
    total, place = 0.0, 0
    for begin, end in ours:
        while place < len(theirs) and theirs[place][1] <= begin:
            place += 1
        for their_begin, their_end in theirs[place:]:
            if their_begin >= end:
                break
            total += min(end, their_end) - max(begin, their_begin)
    return total
