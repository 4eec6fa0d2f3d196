"""Device memory that all ranks of a node can write, and what lies where in it.

Each rank allocates a control region (flags and exchange rows, see `Regions`) and a heap, from which landings are
granted; peers map both through CUDA IPC. Ranks may share a GPU. A heap that is too small is replaced by a larger one.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from commlib.bootstrap import Bootstrap
from commlib.bootstrap.agreement import allgather_or_raise
from commlib.config import RuntimeConfig
from commlib.cuda.decode import packet_room
from commlib.cuda.driver import Event
from commlib.cuda.host_page import HostPage
from commlib.cuda.launch import MAX_PARTS, message_packets, plan_packets
from commlib.cuda.params import ExchangeHeader, FaultNote, LatencyRegions, sizeof
from commlib.errors import CapacityError, TransportError
from commlib.layout import align_up, format_bytes

__all__ = ["ALIGNMENT", "Arena", "Heap", "Regions", "Segment", "Slab"]

_logger = logging.getLogger("commlib.cuda")

ALIGNMENT = 256
_LINE = 64
_LAZY_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess


@dataclass(frozen=True)
class Regions:
    """Byte offsets of the control region. The kernels get these numbers; they are computed nowhere else."""

    config: RuntimeConfig
    num_ranks: int
    num_nodes: int = 1
    max_local_ranks: int = 1
    offsets: dict[str, int] = field(init=False)
    exchange_row_bytes: int = field(init=False)
    total_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        ranks = self.num_ranks
        columns = self.config.num_experts + ranks + (self.num_nodes if self.num_nodes > 1 else 0)
        row_bytes = align_up(sizeof(ExchangeHeader) + 4 * columns, _LINE)
        arrival_bytes = 4 * ranks * self.config.max_tokens
        regions = {
            "fault_word": _LINE,
            "fault_note": ranks * sizeof(FaultNote),
            "exchange_epoch": ranks * _LINE,
            "exchange_row": 2 * ranks * row_bytes,
            "dispatch_arrived": arrival_bytes,
            "combine_arrived": arrival_bytes,
            **self._tier_regions(),
            **self._latency_regions(),
        }
        offsets, end = {}, 0
        for name, num_bytes in regions.items():
            offsets[name] = end
            end = align_up(end + num_bytes, ALIGNMENT)
        object.__setattr__(self, "offsets", offsets)
        object.__setattr__(self, "exchange_row_bytes", row_bytes)
        object.__setattr__(self, "total_bytes", end)

    def _tier_regions(self) -> dict[str, int]:
        """Several nodes: flags of partial rows by source, and of rows that come home from other nodes."""
        if self.num_nodes == 1:
            return {}
        tokens = self.config.max_tokens
        return {
            "partial_arrived": 4 * self.num_ranks * self.max_local_ranks * tokens,
            "home_arrived": 4 * self.num_nodes * tokens,
        }

    def _latency_regions(self) -> dict[str, int]:
        """Of the latency regime: two generations of slots for rows, choices and partial rows of BF16."""
        ranks, tokens = self.num_ranks, self.config.decode_tokens
        if tokens is None or self.num_nodes > 1:
            return {}
        sizes = self.latency_sizes()
        return {
            "slots": 2 * ranks * tokens * sizes["slot_bytes"],
            "messages": 2 * ranks * sizes["message_bytes"],
            "partials": 2 * ranks * tokens * sizes["partial_bytes"],
            "partial_epoch": ranks * tokens * MAX_PARTS * 4,
            "dispatch_done": 8 * ranks * self.config.num_sms,
            "combine_done": 8 * ranks * self.config.num_sms,
            "block_epochs": 4 * 8 * self.config.num_sms,
        }

    def latency_sizes(self) -> dict[str, int]:
        """Bytes and offsets inside a slot, see LatencyRegions in native/cuda/latency.cuh."""
        config, row_bytes = self.config, 2 * self.config.hidden
        room = packet_room(config, self.num_ranks)
        weights_offset = max(plan_packets(row_bytes, room, is_cast=is_cast).slot_bytes for is_cast in (False, True))
        return {
            "weights_offset": weights_offset,
            "slot_bytes": align_up(weights_offset + 8 * config.num_topk, 128),
            "partial_bytes": align_up(row_bytes, 128),
            "message_bytes": align_up(16 * message_packets(config.decode_tokens or 0, config.num_topk), _LINE),
        }

    def latency(self) -> LatencyRegions:
        """For the kernels of the latency regime."""
        names = self._latency_regions()
        offsets = {name: self.offsets[name] for name in names}
        return LatencyRegions(max_tokens=self.config.decode_tokens, **offsets, **self.latency_sizes())


class Slab:
    """A piece of the heap; goes back when nobody refers to it any more.

    The memory may be granted again by the next operation, which is ordered after everything that the stream current at
    that call has been given before, and after what the streams of `record_stream` have when the slab goes back.
    """

    def __init__(self, heap: Heap, offset: int, num_bytes: int) -> None:
        self.offset = offset
        self.num_bytes = num_bytes
        self._heap = heap
        self._streams: list[Any] = []

    def __del__(self) -> None:
        self._heap._give_back(self.offset, self.num_bytes, self._streams)

    @property
    def address(self) -> int:
        return self._heap.address + self.offset

    def record_stream(self, stream: Any) -> None:
        """Work on a torch stream uses the slab."""
        self._streams.append(stream)

    def split_front(self, num_bytes: int) -> Slab:
        """Cuts off the first `num_bytes` (rounded up) as a slab of their own; this one keeps the rest."""
        num_bytes = align_up(num_bytes, ALIGNMENT)
        assert num_bytes <= self.num_bytes, (num_bytes, self.num_bytes)
        front = Slab(self._heap, self.offset, num_bytes)
        self.offset += num_bytes
        self.num_bytes -= num_bytes
        return front


class Heap:
    """Which bytes of an own segment are free: first fit, host bookkeeping only.

    Slabs may go back at any moment, on any thread (a garbage collection, autograd's thread), so what goes back waits in
    a queue until the next slab is taken.
    """

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address = address
        self.num_bytes = num_bytes
        self._free: list[tuple[int, int]] = [(0, num_bytes)] if num_bytes else []
        self._returned: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()
        self._when_unused: Callable[[], Any] | None = None
        self.release_events: deque[Any] = deque()  # the next operation waits for these

    @property
    def used_bytes(self) -> int:
        with self._lock:
            self._merge()
            used = self.num_bytes - sum(size for _, size in self._free)
        self._check_unused()  # whoever gave something back meanwhile did not get the lock
        return used

    @property
    def largest_bytes(self) -> int:
        """Of the largest free block."""
        with self._lock:
            self._merge()
            largest = max((size for _, size in self._free), default=0)
        self._check_unused()
        return largest

    def when_unused(self, call: Callable[[], Any]) -> None:
        """Calls `call` once no slab of this heap is in use, perhaps at once. None may be taken from now on."""
        self._when_unused = call
        self._check_unused()

    def take(self, num_bytes: int) -> Slab:
        """The first block with room, or the largest there is if none has."""
        num_bytes = align_up(num_bytes, ALIGNMENT)
        with self._lock:
            self._merge()
            for place, (offset, size) in enumerate(self._free):
                if size >= num_bytes:
                    self._free[place : place + 1] = [(offset + num_bytes, size - num_bytes)] if size > num_bytes else []
                    return Slab(self, offset, num_bytes)
        return self.take_largest()

    def take_largest(self) -> Slab:
        """The largest free block, of 0 bytes if there is none."""
        with self._lock:
            self._merge()
            if not self._free:
                return Slab(self, 0, 0)
            place = max(range(len(self._free)), key=lambda i: self._free[i][1])
            offset, size = self._free.pop(place)
            return Slab(self, offset, size)

    def _give_back(self, offset: int, num_bytes: int, streams: list[Any]) -> None:
        if num_bytes == 0:
            return
        for stream in streams:
            with torch.cuda.device(stream.device):  # whatever thread this is
                event = Event()
                event.record(stream.cuda_stream)
            self.release_events.append(event)
        self._returned.append((offset, num_bytes))
        self._check_unused()

    def _check_unused(self) -> None:
        """Whoever holds the lock looks again when it is free, so that nobody has to wait for it here."""
        while self._when_unused is not None and self._lock.acquire(blocking=False):
            call = None
            try:
                self._merge()
                if self._free == [(0, self.num_bytes)] or self.num_bytes == 0:
                    call, self._when_unused = self._when_unused, None
            finally:
                self._lock.release()
            if call is not None:
                call()
            if not self._returned:
                return

    def _merge(self) -> None:
        """Takes in what has come back. The lock is held."""
        if not self._returned:
            return
        blocks = list(self._free)
        while self._returned:
            blocks.append(self._returned.popleft())
        blocks.sort()
        merged = [blocks[0]]
        for start, size in blocks[1:]:
            last, length = merged[-1]
            assert last + length <= start, "a slab was given back twice"
            if last + length == start:
                merged[-1] = (last, length + size)
            else:
                merged.append((start, size))
        self._free = merged


class Segment:
    """Device memory of one rank that the others map through CUDA IPC. The current CUDA device is the rank's."""

    def __init__(self, num_bytes: int) -> None:
        """Allocates.

        Raises:
            CapacityError: the device has less memory.
        """
        self._runtime = _cuda_runtime()
        self.num_bytes = num_bytes
        try:
            self.address: int = self._runtime.malloc(num_bytes)
        except self._runtime.CUDARuntimeError as error:
            free, _ = self._runtime.memGetInfo()
            raise CapacityError(
                f"{format_bytes(num_bytes)} do not fit into the {format_bytes(free)} free on the device ({error})",
                needed=num_bytes,
                available=free,
            ) from error

    def clear(self) -> None:
        """Zeros, before anybody else knows of it."""
        self._runtime.memset(self.address, 0, self.num_bytes)
        self._runtime.deviceSynchronize()

    def handle(self) -> bytes:
        """What `map_peer` takes in another process."""
        return bytes(self._runtime.ipcGetMemHandle(self.address))

    def free(self) -> None:
        if self.address:
            self._runtime.free(self.address)
            self.address = 0


def map_peer(rank: int, handle: bytes) -> int:
    """Address of a peer's segment in this process.

    Raises:
        TransportError: the driver refuses.
    """
    runtime = _cuda_runtime()
    try:
        return int(runtime.ipcOpenMemHandle(handle, _LAZY_PEER_ACCESS))
    except runtime.CUDARuntimeError as error:
        raise TransportError(
            f"the memory of rank {rank} cannot be mapped: {error}", call="cudaIpcOpenMemHandle", code=error.status
        ) from error


def unmap_peer(address: int) -> None:
    if address:
        _cuda_runtime().ipcCloseMemHandle(address)


def _cuda_runtime() -> Any:
    import cupy

    return cupy.cuda.runtime


class Arena:
    """One rank's segments, control region and heap, and the mappings of all others'.

    Construction is collective; the current CUDA device is the rank's.

    Args:
        boot: the ranks.
        node_ranks: those of this rank's node; memory of others is not mapped, its address is 0.
        page: of the same ranks.
        regions: what lies in the control region.
        heap_bytes: room for landings.
        timeout_s: seconds within which all ranks must come.

    Raises:
        CapacityError: the device has less memory; on all ranks.
        TransportError: a peer's memory cannot be mapped; on all ranks.
    """

    def __init__(
        self,
        boot: Bootstrap,
        node_ranks: Sequence[int],
        page: HostPage,
        regions: Regions,
        heap_bytes: int,
        timeout_s: float,
    ) -> None:
        self.rank, self.page, self._timeout_s = boot.rank, page, timeout_s
        self._peers = [rank for rank in node_ranks if rank != boot.rank]
        self.regions = regions
        self._num_retired = 0
        self._replaced: list[tuple[Heap, Segment]] = []
        self.base = [0] * boot.size  # of control regions
        self.heap_base = [0] * boot.size
        is_shared = boot.size > 1  # also where this rank is alone on its node: all tell as much

        def allocate() -> bytes:
            self._control, self._segment = Segment(regions.total_bytes), Segment(align_up(heap_bytes, ALIGNMENT))
            self._control.clear()
            return self._control.handle() + self._segment.handle() if is_shared else b""

        handles = allgather_or_raise(boot, allocate, timeout_s=timeout_s)
        half = len(handles[0]) // 2

        def connect() -> bytes:
            for rank in self._peers:
                control, heap = handles[rank][:half], handles[rank][half:]
                self.base[rank], self.heap_base[rank] = map_peer(rank, control), map_peer(rank, heap)
            return b""

        allgather_or_raise(boot, connect, timeout_s=timeout_s)
        self.base[self.rank], self.heap_base[self.rank] = self._control.address, self._segment.address
        self.heap = Heap(self._segment.address, self._segment.num_bytes)

    def replace_heaps(self, own: Segment | None, handles: list[bytes]) -> None:
        """After a rank has grown: all ranks come, and no operation of any rank is under way.

        Args:
            own: this rank's new heap, if it has one; results in the old one stay valid.
            handles: per rank, of its new heap; empty if it keeps the old one.
        """
        old = list(self.heap_base)
        for rank, handle in enumerate(handles):
            if handle and rank in self._peers:
                self.heap_base[rank] = map_peer(rank, handle)
        for before, now in zip(old, self.heap_base, strict=True):
            if before != now:
                unmap_peer(before)
        self._num_retired += 1
        self.page.retire(self._num_retired)
        self.page.wait_retired(self._num_retired, self._timeout_s)
        if own is not None:
            self._replaced = [(heap, segment) for heap, segment in self._replaced if segment.address]
            self._replaced.append((self.heap, self._segment))
            self.heap.when_unused(self._segment.free)
            self._segment = own
            self.heap_base[self.rank] = own.address
            self.heap = Heap(own.address, own.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Of the control region and the heaps."""
        return self._control.num_bytes + self.heap_bytes

    @property
    def heap_bytes(self) -> int:
        """Of the heap and of those before it in which results still lie."""
        return self._segment.num_bytes + sum(segment.num_bytes for _, segment in self._replaced if segment.address)

    @property
    def used_bytes(self) -> int:
        """Of `heap_bytes`, what results and handles occupy."""
        replaced = sum(heap.used_bytes for heap, segment in self._replaced if segment.address)
        return self.heap.used_bytes + replaced

    def close(self, *, is_quiet: bool) -> None:
        """Unmaps and frees. `is_quiet`: all ranks come and nobody writes any more; otherwise everything stays."""
        if not is_quiet:  # own kernels, too, may still write to peers
            size = format_bytes(self.num_bytes)
            _logger.warning("rank %d keeps %s mapped: kernels may still write there", self.rank, size)
            return
        for rank in self._peers:
            unmap_peer(self.base[rank])
            unmap_peer(self.heap_base[rank])
        self._num_retired += 1
        self.page.retire(self._num_retired)
        self.page.wait_retired(self._num_retired, self._timeout_s)
        self._control.free()
        self.heap.when_unused(self._segment.free)  # results that were handed out stay valid
