"""What the executor's kernels need before the first operation: machine code, device memory, the mesh."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from commlib.config import RuntimeConfig
from commlib.cuda.dispatch_layout import load_layout
from commlib.cuda.driver import Kernel
from commlib.cuda.gate import load_gate
from commlib.cuda.launch import MAX_SHARED_BYTES
from commlib.cuda.memory import Regions
from commlib.cuda.params import WORKSPACE_BYTES, FaultNote, HostResult, Mesh, Workspace, sizeof
from commlib.cuda.units import load_units
from commlib.layout import align_up

__all__ = ["EXCHANGE_THREADS", "Buffers", "load_executor_kernels", "make_mesh"]

EXCHANGE_THREADS = 512
_LINE = 64  # bytes
_RESULTS = 2  # of operations whose sizes the host may still want
_PEER_LOST = 2  # FaultNote::kind


def load_executor_kernels(*, has_latency: bool, has_tiers: bool) -> dict[str, Kernel]:
    """All kernels, loaded: later the driver would wait for running kernels, which may wait for this one on a peer."""
    wanted = ["exchange", "dispatch", "combine_bf16", "combine_f32"]
    if has_tiers:
        wanted += ["tier_dispatch", "tier_combine_bf16", "tier_combine_f32"]
    if has_latency:
        wanted += ["latency_dispatch", "latency_combine"]
    load_gate(torch.cuda.current_device())
    load_layout(torch.cuda.current_device())
    return load_units({name: {name: MAX_SHARED_BYTES} for name in wanted})


class Buffers:
    """Memory of one Runtime that no peer sees."""

    def __init__(self, config: RuntimeConfig, num_ranks: int, num_blocks: int, device: Any, num_nodes: int = 1) -> None:
        columns = config.num_experts + num_ranks
        self.workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        first = Workspace.input_error.offset
        self.workspace[first : first + 8] = 255  # none
        self.slots = torch.empty(config.max_tokens * config.num_topk * 2, dtype=torch.int32, device=device)
        self.block_base = torch.empty(num_blocks * columns, dtype=torch.int32, device=device)
        self.tail_words = num_ranks**2 + config.num_experts // num_ranks + config.num_experts
        if num_nodes > 1:
            self.tail_words += num_ranks * num_nodes
            self.node_masks = torch.empty(config.max_tokens, dtype=torch.int32, device=device)
        self._result_bytes = align_up(sizeof(HostResult) + 4 * self.tail_words, _LINE)
        self.scratch_result = torch.zeros(self._result_bytes, dtype=torch.uint8, device=device)
        self.slots_address, self.block_base_address = self.slots.data_ptr(), self.block_base.data_ptr()
        self.scratch_address = self.scratch_result.data_ptr()
        board_bytes = align_up(sizeof(FaultNote), _LINE)
        self._pinned = torch.zeros(
            board_bytes + (_RESULTS + 1) * self._result_bytes + _LINE, dtype=torch.uint8, pin_memory=True
        )
        self.board_address = self._pinned.data_ptr()
        self._first_result = self.board_address + board_bytes
        self.refused_address = self._first_result + _RESULTS * self._result_bytes
        self.stop_address = self.refused_address + self._result_bytes
        self.board = FaultNote.from_address(self.board_address)
        self.refused = HostResult.from_address(self.refused_address)
        self._fault = torch.zeros(sizeof(FaultNote) + 8, dtype=torch.uint8, pin_memory=True)
        # Of its own: one of torch's could be queued behind the very kernel that waits.
        import cupy

        self._fault_stream = cupy.cuda.Stream(non_blocking=True)
        torch.cuda.current_stream().synchronize()

    def result_address(self, ticket: int) -> int:
        """Where an operation tells the host what came of it."""
        return self._first_result + ticket % _RESULTS * self._result_bytes

    def overflowed(self) -> Any:
        """The sticky flag as an int32 tensor [1] on the device."""
        first = Workspace.overflowed.offset
        return self.workspace[first : first + 4].view(torch.int32)

    def end_kernels(self) -> None:
        """Ends the waits of this rank's kernels, without a call of the driver. For good."""
        ctypes.c_uint64.from_address(self.stop_address).value = 1

    def raise_fault(self, controls: list[int], regions: Regions, rank: int, peer: int) -> None:
        """Ends the waits of the kernels of those ranks whose control regions are given: `peer` is lost."""
        import cupy

        note = FaultNote.from_address(self._fault.data_ptr())
        note.kind, note.rank, note.peer = _PEER_LOST, rank, peer
        self._fault[sizeof(FaultNote) :].view(torch.int64)[0] = rank + 1
        runtime, source = cupy.cuda.runtime, self._fault.data_ptr()
        for control in controls:
            for to, start, size in (
                (regions.offsets["fault_note"] + rank * sizeof(FaultNote), source, sizeof(FaultNote)),
                (regions.offsets["fault_word"], source + sizeof(FaultNote), 8),
            ):
                runtime.memcpyAsync(control + to, start, size, runtime.memcpyHostToDevice, self._fault_stream.ptr)
        self._fault_stream.synchronize()


def make_mesh(config: RuntimeConfig, rank: int, num_ranks: int, regions: Regions, buffers: Buffers) -> Mesh:
    """All but the addresses of the ranks' segments."""
    return Mesh(
        rank=rank,
        num_ranks=num_ranks,
        num_experts=config.num_experts,
        num_topk=config.num_topk,
        max_tokens=config.max_tokens,
        experts_per_rank=config.num_experts // num_ranks,
        timeout_ns=int(config.timeout_s * 1e9),
        exchange_row_bytes=regions.exchange_row_bytes,
        board=buffers.board_address,
        stop=buffers.stop_address,
        workspace=buffers.workspace.data_ptr(),
        **{name: regions.offsets[name] for name in regions.offsets if hasattr(Mesh, name)},
    )
