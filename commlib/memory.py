"""How much memory a Runtime holds: the arena (scale-up) and the registered region (scale-out)."""

from __future__ import annotations

from typing import NamedTuple

from commlib.layout import format_bytes

__all__ = ["MemoryReport"]


class MemoryReport(NamedTuple):
    """Bytes of one rank.

    Attributes:
        registered_bytes: rings, counters and exchange rows that scale-out peers write; fixed at construction.
        arena_bytes: shared memory committed so far.
        arena_used_bytes: part of it that live results and handles occupy.
    """

    registered_bytes: int
    arena_bytes: int
    arena_used_bytes: int

    def __str__(self) -> str:
        return (
            f"registered {format_bytes(self.registered_bytes)}, arena {format_bytes(self.arena_bytes)}, "
            f"in use {format_bytes(self.arena_used_bytes)}"
        )
