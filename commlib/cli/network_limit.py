"""`commlib bench --device cuda` on several nodes: plain puts of the same bytes between the same processes, in the kind
of memory in which the Runtime's rings lie."""

from __future__ import annotations

import statistics
from typing import Any

from commlib.bootstrap import Bootstrap
from commlib.bootstrap.agreement import largest_of
from commlib.cli.put_limit import PutLimit, put_ways
from commlib.cuda.rings import RingMemory
from commlib.runtime import Runtime

__all__ = ["NetworkLimit"]

_ROUNDS = 7


class NetworkLimit:
    """The faster of `put_ways`.

    Args:
        boot: the ranks of `runtime`.
        runtime: for its topology, transport and rings.
        executor: its CudaEngine.
        num_rows: [node] rows from this rank.
    """

    def __init__(self, boot: Bootstrap, runtime: Runtime, executor: Any, num_rows: list[int]) -> None:
        self._boot, self._runtime, self._num_rows = boot, runtime, num_rows
        self._has_device_rings: bool = executor.tiers.has_device_rings
        self._found: dict[tuple[int, bool], tuple[float, float]] = {}

    def measure(self, row_bytes: int, *, is_combine: bool) -> tuple[float, float]:
        """Bytes of the rank that sends most, and microseconds of the slowest; collective."""
        key = (row_bytes, is_combine)
        if key not in self._found:
            self._found[key] = self._measure(row_bytes, is_combine)
        return self._found[key]

    def _measure(self, row_bytes: int, is_combine: bool) -> tuple[float, float]:
        num_bytes = [rows * row_bytes for rows in self._num_rows]
        times = []
        for size, window in put_ways(self._runtime.config).values():
            memory = RingMemory(size * window) if self._has_device_rings else None
            address = 0 if memory is None else memory.address
            limit = PutLimit(self._boot, self._runtime, num_bytes, size, window, address)
            rounds = [self._most(limit.seconds(is_combine=is_combine)) for _ in range(_ROUNDS + 1)]
            times.append(statistics.median(rounds[1:]))  # connections are made in the first
            limit.close()
            if memory is not None:
                memory.release(is_quiet=True)
        return self._most(sum(num_bytes)), 1e6 * min(times)

    def _most(self, value: float) -> float:
        return largest_of(self._boot, value, timeout_s=60)
