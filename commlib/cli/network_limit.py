"""`commlib bench --device cuda` on several nodes: plain puts of the same bytes between the same processes, in the kind
of memory in which the Runtime's rings lie."""

from __future__ import annotations

import json
import statistics

from commlib.bootstrap import Bootstrap
from commlib.cli.put_limit import PutLimit
from commlib.cuda.rings import RingMemory
from commlib.runtime import Runtime

__all__ = ["NetworkLimit"]

_LARGE = (256 << 10, 16)  # bytes of a put, puts in flight
_ROUNDS = 7


class NetworkLimit:
    """The faster of two ways: messages as our rings send them, or large ones with much in flight.

    Args:
        boot: the ranks of `runtime`.
        runtime: for its topology, transport and rings.
        num_rows: [node] rows from this rank.
    """

    def __init__(self, boot: Bootstrap, runtime: Runtime, num_rows: list[int]) -> None:
        self._boot, self._runtime, self._num_rows = boot, runtime, num_rows
        self._has_device_rings = "rings in GPU memory" in runtime.describe()
        self._found: dict[tuple[int, bool], tuple[float, float]] = {}

    def measure(self, row_bytes: int, *, is_combine: bool) -> tuple[float, float]:
        """Bytes of the rank that sends most, and microseconds of the slowest; collective."""
        key = (row_bytes, is_combine)
        if key not in self._found:
            self._found[key] = self._measure(row_bytes, is_combine)
        return self._found[key]

    def _measure(self, row_bytes: int, is_combine: bool) -> tuple[float, float]:
        config = self._runtime.config
        num_bytes = [rows * row_bytes for rows in self._num_rows]
        times = []
        for size, window in ((config.chunk_bytes, config.ring_bytes // config.chunk_bytes), _LARGE):
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
        return float(max(json.loads(blob) for blob in self._boot.allgather(json.dumps(value).encode(), timeout_s=60)))
