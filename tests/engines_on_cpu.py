"""The GPU executor with kernels that run on this CPU (kernels_on_cpu.py): ranks are threads of one process."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from kernels_on_cpu import CpuKernels

import commlib.cuda.dispatching as dispatching_module
import commlib.cuda.engine as engine_module
import commlib.cuda.queue as queue_module
from commlib.config import RuntimeConfig
from commlib.cuda.combining import CombineOps
from commlib.cuda.dispatching import DispatchOps
from commlib.cuda.engine import CudaEngine
from commlib.cuda.kernels import WORKSPACE_BYTES, Buffers, make_mesh
from commlib.cuda.latency import LatencyOps
from commlib.cuda.launch import Tuning, settle_bytes
from commlib.cuda.memory import Heap, Regions, Slab
from commlib.cuda.params import FaultNote, HostResult, Workspace, sizeof
from commlib.cuda.watch import Watch
from commlib.topology import Topology

_T = TypeVar("_T")

# Fewer warps than on a GPU: every lane is a thread here. Two of each kind, so that they share work.
TUNING = Tuning(
    dispatch_warps=2, push_warps=1, cast_push_warps=1, rows_push_warps=2,
    combine_warps=3, final_warps=1, rows_final_warps=1,
)  # fmt: skip
_LATENCY_THREADS = 64


class NoEvent:
    """Launches return when kernels have ended."""

    num_looks = 0

    def record(self, stream: int) -> None:
        pass

    def wait(self, stream: int) -> None:
        pass

    def has_passed(self) -> bool:
        NoEvent.num_looks += 1
        return True

    def synchronize(self) -> None:
        pass


class _SlabBytes(np.ndarray[Any, Any]):
    slab: Slab


def slab_bytes(address: int, num_bytes: int, slab: Slab) -> np.ndarray:
    """In place of ArenaBytes: memory that keeps its slab."""
    heap: Any = slab._heap
    first = address - heap.memory.ctypes.data
    piece = heap.memory[first : first + num_bytes].view(_SlabBytes)
    piece.slab = slab
    return piece


class HostHeap(Heap):
    def __init__(self, memory: np.ndarray[Any, Any]) -> None:
        self.memory = memory
        super().__init__(memory.ctypes.data, len(memory))


def private_memory(num_bytes: int) -> np.ndarray[Any, Any]:
    """Zeros, page-aligned."""
    return np.frombuffer(mmap.mmap(-1, num_bytes), dtype=np.uint8)


class HostSegment:
    """In place of device memory that a heap grows into; peers of the same process have it by its address."""

    def __init__(self, num_bytes: int) -> None:
        self.memory = private_memory(num_bytes)

    def handle(self) -> bytes:
        return self.memory.ctypes.data.to_bytes(8, "little")


class HostArena:
    """What the engine asks of `commlib.cuda.memory.Arena`."""

    def __init__(self, regions: Regions, memory: np.ndarray[Any, Any]) -> None:
        self.regions, self.heap = regions, HostHeap(memory)
        self.heap_base: list[int] = []

    def replace_heaps(self, own: HostSegment | None, handles: list[bytes]) -> None:
        for rank, handle in enumerate(handles):
            if handle:
                self.heap_base[rank] = int.from_bytes(handle, "little")
        if own is not None:
            self.heap = HostHeap(own.memory)


class HostBuffers:
    """`commlib.cuda.kernels.Buffers` in memory of this process."""

    def __init__(self, config: RuntimeConfig, num_ranks: int, num_nodes: int) -> None:
        self._num_results = 8
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8)
        first = Workspace.input_error.offset
        self.workspace[first : first + 8] = 255
        self.slots = torch.empty(config.max_tokens * config.num_topk * 2, dtype=torch.int32)
        self.block_base = torch.empty(config.num_sms * (config.num_experts + num_ranks), dtype=torch.int32)
        self.node_masks = torch.empty(config.max_tokens, dtype=torch.int32)
        self.slots_address, self.block_base_address = self.slots.data_ptr(), self.block_base.data_ptr()
        self.tail_words = num_ranks**2 + config.num_experts // num_ranks + config.num_experts + num_ranks * num_nodes
        self._result_bytes = -(-(sizeof(HostResult) + 4 * self.tail_words) // 64) * 64
        self._memory = torch.zeros((self._num_results + 3) * self._result_bytes + 64, dtype=torch.uint8)
        self.board_address = self._memory.data_ptr()
        self.scratch_address = self.board_address + self._result_bytes
        self.refused_address = self.scratch_address + self._result_bytes
        self.stop_address = self.board_address + (self._num_results + 3) * self._result_bytes
        self.board = FaultNote.from_address(self.board_address)
        self.refused = HostResult.from_address(self.refused_address)

    end_kernels = Buffers.end_kernels

    def result_address(self, ticket: int) -> int:
        return self.refused_address + (1 + ticket % self._num_results) * self._result_bytes

    def overflowed(self) -> torch.Tensor:
        first = Workspace.overflowed.offset
        return self.workspace[first : first + 4].view(torch.int32)


class CpuEngine(CudaEngine):
    """Whoever makes it fills in where the other ranks' memory is: `mesh.base`, `mesh.heap`.

    Args:
        rank, config: of the engine.
        topology: of all ranks.
        kernels: that run.
        allocate: memory that the ranks of the node see.
        tiers: of several nodes.
    """

    def __init__(
        self,
        rank: int,
        config: RuntimeConfig,
        topology: Topology,
        kernels: CpuKernels,
        allocate: Callable[[int], np.ndarray[Any, Any]] = private_memory,
        tiers: Any = None,
    ) -> None:
        num_ranks, num_nodes = topology.num_ranks, topology.num_nodes
        self.config, self.rank, self.num_ranks = config, rank, num_ranks
        self.num_sms = self.num_local_sms = config.num_sms
        self.device, self.topology, self.tiers = torch.device("cpu"), topology, tiers
        self.tuning, self.marks = TUNING, None
        self._kernels_on_cpu = kernels
        self._id, self._ticket, self._is_closed = 1, 0, False
        self._unsettled, self._not_received, self._captured = [], [], []
        self._experts_per_rank = config.num_experts // num_ranks
        self._settle_bytes = settle_bytes(config.num_experts, num_ranks)
        regions = regions_of(config, topology)
        self.buffers: Any = HostBuffers(config, num_ranks, num_nodes)
        self.control = allocate(regions.total_bytes)
        self.arena: Any = HostArena(regions, allocate(config.arena_bytes or 4 << 20))
        page: Any = SimpleNamespace(lost_peer=lambda: None)
        self._watch = Watch(rank, num_ranks, config, page, self.arena, self.buffers, tiers)
        self.mesh = make_mesh(config, rank, num_ranks, regions, self.buffers)
        if tiers is not None:
            self.mesh.fabric = tiers.view.data_ptr()
        self._last_stream = None
        self._last_event, self._join_event, self._stream = NoEvent(), NoEvent(), SimpleNamespace(cuda_stream=1)
        self._slabs = weakref.WeakValueDictionary()
        self._dispatches, self._combines, self._latency = DispatchOps(self), CombineOps(self), None
        if config.decode_tokens is not None and tiers is None:
            self._latency = LatencyOps(self)

    def current_stream(self) -> int:
        return 0

    def launch(self, stream: int, call: Any) -> None:
        threads = _LATENCY_THREADS if call.name.startswith("latency") else call.threads
        self._kernels_on_cpu.run(call.name, call.blocks, threads, call.shared_bytes, call.arguments.structs)


def regions_of(config: RuntimeConfig, topology: Topology) -> Regions:
    most_local = max(map(topology.num_local_ranks, range(topology.num_ranks)))
    return Regions(config, topology.num_ranks, topology.num_nodes, most_local)


class World:
    """Engines of ranks that share one node."""

    def __init__(self, kernels: CpuKernels, num_ranks: int, **options: Any) -> None:
        self.config = RuntimeConfig(timeout_s=options.pop("timeout_s", 60.0), **options)
        topology = Topology((0,) * num_ranks)
        self.engines = [CpuEngine(rank, self.config, topology, kernels) for rank in range(num_ranks)]
        self._ranks = ThreadPoolExecutor(num_ranks)
        for engine in self.engines:
            engine.mesh.base[:num_ranks] = [each.control.ctypes.data for each in self.engines]
            engine.arena.heap_base = [each.arena.heap.address for each in self.engines]
            engine.mesh.heap[:num_ranks] = engine.arena.heap_base

    def each(self, function: Callable[[CpuEngine, int], _T]) -> list[_T]:
        """`function(engine, rank)` on all ranks at once; the results, or what they raised, as `Exception` objects."""

        def call(engine: CpuEngine, rank: int) -> Any:
            try:
                return function(engine, rank)
            except Exception as error:
                return error

        return list(self._ranks.map(call, self.engines, range(len(self.engines))))

    def all(self, function: Callable[[CpuEngine, int], _T]) -> list[_T]:
        """Like `each`, and raises what the first of them has raised."""
        results = self.each(function)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results


def replace_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine asks of torch's CUDA and of the driver, for launches that are over when they return."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(engine_module, "bind_context", lambda device: None)
    monkeypatch.setattr(queue_module, "Event", NoEvent)
    monkeypatch.setattr(queue_module, "Segment", HostSegment)
    monkeypatch.setattr(dispatching_module, "ArenaBytes", slab_bytes)
