"""Device memory that all ranks of a node can write, and what lies where in it.

Each rank allocates one arena; peers map it through CUDA IPC. Ranks may share a GPU. The arena starts with the control
region (flags and exchange rows, see `Regions`) and goes on with the heap, from which landings are granted.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from commlib.bootstrap import Bootstrap
from commlib.bootstrap.agreement import allgather_or_raise
from commlib.config import RuntimeConfig
from commlib.cuda.params import ExchangeHeader, FaultNote, sizeof
from commlib.errors import CapacityError, TransportError
from commlib.layout import align_up, format_bytes, record_bytes

__all__ = ["ALIGNMENT", "Arena", "Heap", "Regions", "Slab", "default_heap_bytes"]

_logger = logging.getLogger("commlib.cuda")

ALIGNMENT = 256
_LINE = 64
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess


def default_heap_bytes(config: RuntimeConfig, num_ranks: int) -> int:
    """Room for one balanced BF16 dispatch, half as much again, and the landing of its combine."""
    per_rank = config.max_tokens * config.num_topk
    padding = (config.num_experts // num_ranks) * config.expert_alignment
    rows = (3 * per_rank // 2 + padding) * (2 * config.hidden + 4)
    landing = config.max_tokens * min(config.num_topk, num_ranks) * (2 * config.hidden + record_bytes(config.num_topk))
    return align_up(rows + 2 * landing, 1 << 20)


@dataclass(frozen=True)
class Regions:
    """Byte offsets of the control region. The kernels get these numbers; they are computed nowhere else."""

    config: RuntimeConfig
    num_ranks: int
    offsets: dict[str, int] = field(init=False)
    exchange_row_bytes: int = field(init=False)
    total_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        ranks = self.num_ranks
        row_bytes = align_up(sizeof(ExchangeHeader) + 4 * (self.config.num_experts + ranks), _LINE)
        arrival_bytes = 4 * ranks * self.config.max_tokens
        regions = {
            "fault_word": _LINE,
            "fault_note": ranks * sizeof(FaultNote),
            "exchange_epoch": ranks * _LINE,
            "exchange_row": 2 * ranks * row_bytes,
            "dispatch_arrived": arrival_bytes,
            "combine_arrived": arrival_bytes,
        }
        offsets, end = {}, 0
        for name, num_bytes in regions.items():
            offsets[name] = end
            end = align_up(end + num_bytes, ALIGNMENT)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "exchange_row_bytes", row_bytes)
        object.__setattr__(self, "total_bytes", end)


class Slab:
    """A piece of the heap; goes back when nobody refers to it any more.

    The memory may be granted again by the next operation, which is ordered after everything that the stream current at
    that call has been given before. Whoever reads a result on another stream makes the current stream wait for that.
    """

    def __init__(self, heap: Heap, offset: int, num_bytes: int) -> None:
        self.offset = offset
        self.num_bytes = num_bytes
        self._heap = heap
        self._finalizer = weakref.finalize(self, heap._give_back, offset, num_bytes)
        self._finalizer.atexit = False

    def split_front(self, num_bytes: int) -> Slab:
        """Cuts off the first `num_bytes` (rounded up) as a slab of their own; this one keeps the rest."""
        num_bytes = align_up(num_bytes, ALIGNMENT)
        assert num_bytes <= self.num_bytes, (num_bytes, self.num_bytes)
        front = Slab(self._heap, self.offset, num_bytes)
        self._finalizer.detach()
        self.offset += num_bytes
        self.num_bytes -= num_bytes
        self._finalizer = weakref.finalize(self, self._heap._give_back, self.offset, self.num_bytes)
        self._finalizer.atexit = False
        return front


class Heap:
    """Which bytes of the own arena are free: first fit, host bookkeeping only."""

    def __init__(self, offset: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._free: list[tuple[int, int]] = [(offset, num_bytes)] if num_bytes else []
        self.when_empty: Callable[[], Any] | None = None

    @property
    def used_bytes(self) -> int:
        return self.num_bytes - sum(size for _, size in self._free)

    def take(self, num_bytes: int) -> Slab:
        """The first block with room, or the largest there is if none has."""
        num_bytes = align_up(num_bytes, ALIGNMENT)
        for place, (offset, size) in enumerate(self._free):
            if size >= num_bytes:
                if size == num_bytes:
                    del self._free[place]
                else:
                    self._free[place] = (offset + num_bytes, size - num_bytes)
                return Slab(self, offset, num_bytes)
        return self.take_largest()

    def take_largest(self) -> Slab:
        """The largest free block, of 0 bytes if there is none."""
        if not self._free:
            return Slab(self, 0, 0)
        place = max(range(len(self._free)), key=lambda i: self._free[i][1])
        offset, size = self._free.pop(place)
        return Slab(self, offset, size)

    def _give_back(self, offset: int, num_bytes: int) -> None:
        if num_bytes == 0:
            return
        blocks = sorted([*self._free, (offset, num_bytes)])
        merged = [blocks[0]]
        for start, size in blocks[1:]:
            last, length = merged[-1]
            assert last + length <= start, "a slab was given back twice"
            if last + length == start:
                merged[-1] = (last, length + size)
            else:
                merged.append((start, size))
        self._free = merged
        if self.when_empty is not None and self.used_bytes == 0:
            self.when_empty()


class Arena:
    """One rank's arena and the mappings of all others'.

    Construction is collective; the current CUDA device is the rank's.

    Args:
        boot: the ranks; all of them are on this node.
        regions: what lies at the start.
        heap_bytes: room for landings.
        timeout_s: seconds within which all ranks must come.

    Raises:
        CapacityError: the device has less memory; on all ranks.
        TransportError: a peer's memory cannot be mapped; on all ranks.
    """

    def __init__(self, boot: Bootstrap, regions: Regions, heap_bytes: int, timeout_s: float) -> None:
        import cupy

        self._runtime: Any = cupy.cuda.runtime
        self.rank = boot.rank
        self.regions = regions
        self.num_bytes = regions.total_bytes + align_up(heap_bytes, ALIGNMENT)
        self.heap = Heap(regions.total_bytes, align_up(heap_bytes, ALIGNMENT))
        self.base = [0] * boot.size
        self._is_closed = False
        handles = allgather_or_raise(boot, lambda: self._allocate(boot.size), timeout_s=timeout_s)
        allgather_or_raise(boot, lambda: self._map(handles), timeout_s=timeout_s)

    def _allocate(self, num_ranks: int) -> bytes:
        try:
            self.base[self.rank] = self._runtime.malloc(self.num_bytes)
        except self._runtime.CUDARuntimeError as error:
            free, _ = self._runtime.memGetInfo()
            raise CapacityError(
                f"an arena of {format_bytes(self.num_bytes)} does not fit into the {format_bytes(free)} that the "
                f"device has free ({error}); a smaller arena_bytes does",
                needed=self.num_bytes,
                available=free,
            ) from error
        self._runtime.memset(self.base[self.rank], 0, self.regions.total_bytes)
        self._runtime.deviceSynchronize()  # before anybody can write flags there
        return bytes(self._runtime.ipcGetMemHandle(self.base[self.rank])) if num_ranks > 1 else b""

    def _map(self, handles: list[bytes]) -> bytes:
        for rank, handle in enumerate(handles):
            if rank == self.rank:
                continue
            try:
                self.base[rank] = self._runtime.ipcOpenMemHandle(handle, _LAZY_PEER_ACCESS)
            except self._runtime.CUDARuntimeError as error:
                raise TransportError(
                    f"the memory of rank {rank} cannot be mapped: {error}",
                    call="cudaIpcOpenMemHandle",
                    code=error.status,
                ) from error
        return b""

    def address(self, offset: int) -> int:
        """Of a byte of the own arena."""
        return self.base[self.rank] + offset

    def close(self, boot: Bootstrap | None, timeout_s: float) -> None:
        """Unmaps and frees. `boot` = all ranks come and nobody writes any more; None = a peer may still write, so
        the own memory stays allocated."""
        if self._is_closed:
            return
        self._is_closed = True
        for rank, base in enumerate(self.base):
            if rank != self.rank and base:
                self._runtime.ipcCloseMemHandle(base)
        if boot is None:
            _logger.warning("rank %d keeps %s allocated: a peer may still write there", self.rank, self.num_bytes)
            return
        boot.barrier(timeout_s)
        if self.heap.used_bytes == 0:
            self._runtime.free(self.base[self.rank])
        else:  # results that were handed out stay valid: the last of them frees the arena
            self.heap.when_empty = partial(self._runtime.free, self.base[self.rank])
