"""The queue of operations that all ranks issue in one order: construction, launches, verdicts, faults, closing."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import torch

from commlib.bootstrap import Bootstrap
from commlib.config import RuntimeConfig
from commlib.cuda.calls import KINDS, fault_error, refusal
from commlib.cuda.compile import compile_unit, default_cache
from commlib.cuda.driver import Kernel, load_kernels
from commlib.cuda.launch import MAX_SHARED_BYTES, Tuning
from commlib.cuda.memory import Arena, Regions, Slab, default_heap_bytes
from commlib.cuda.operations import PendingOp
from commlib.cuda.params import (
    MAX_RANKS,
    MAX_TOPK,
    TEXT_BYTES,
    WORKSPACE_BYTES,
    CallWords,
    ExchangeCall,
    FaultNote,
    HostResult,
    Mesh,
    sizeof,
)
from commlib.errors import CommTimeout, ConfigError
from commlib.layout import align_up

__all__ = ["OpQueue"]

_EXCHANGE_THREADS = 512
_RESULTS = 4  # of operations whose sizes the host may still want
_GO = 1


class OpQueue:
    """What every operation of `CudaEngine` shares; see there for the arguments."""

    def __init__(
        self,
        boot: Bootstrap,
        config: RuntimeConfig,
        *,
        device: Any,
        num_sms: int = 24,
        heap_bytes: int | None = None,
        tuning: Tuning | None = None,
        connect_timeout_s: float = 60.0,
    ) -> None:
        config.check_ranks(boot.size)
        if boot.size > MAX_RANKS or config.num_topk > MAX_TOPK:
            raise ConfigError(
                f"num_ranks={boot.size} and num_topk={config.num_topk} exceed what a warp serves, "
                f"{MAX_RANKS} and {MAX_TOPK}"
            )
        self.config, self.rank, self.num_ranks, self.num_sms = config, boot.rank, boot.size, num_sms
        self.device = torch.device(device)
        self._timeout_s = connect_timeout_s
        self.boot = boot
        self._epoch = 0
        self._unsettled: list[PendingOp] = []
        # Kernels read the inputs of an operation until it is over, also if the caller drops what it was given.
        self._in_flight: list[PendingOp] = []
        self._tuning = tuning or Tuning()
        self.marks: list[tuple[str, Any, Any]] | None = None  # of each kernel, for measurements: name, start, end
        self._is_closed = self._is_faulty = False
        self._id = id(self)
        self._experts_per_rank = config.num_experts // boot.size
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()  # makes the context
            regions = Regions(config, boot.size)
            heap = default_heap_bytes(config, boot.size) if heap_bytes is None else heap_bytes
            self._kernels = self._load()
            self.arena = Arena(boot, regions, heap, connect_timeout_s)
            self._stream: Any = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
            self._make_buffers()
        self._mesh = self._make_mesh(regions)
        boot.barrier(connect_timeout_s)

    # ---- construction

    def _load(self) -> dict[str, Kernel]:
        kernels: dict[str, Kernel] = {}
        columns = self.config.num_experts + self.num_ranks
        self._exchange_shared = _EXCHANGE_THREADS // 32 * columns * 4
        if self._exchange_shared > MAX_SHARED_BYTES:
            raise ConfigError(f"num_experts={self.config.num_experts} needs more shared memory than a block has")
        wanted = {
            "exchange": {"exchange": self._exchange_shared},
            "dispatch": {"dispatch": MAX_SHARED_BYTES},
            "combine": {"combine_bf16": MAX_SHARED_BYTES, "combine_f32": MAX_SHARED_BYTES},
        }
        for unit, names in wanted.items():
            cubin, _ = compile_unit(unit, default_cache())
            kernels.update(load_kernels(cubin, names))
        return kernels

    def _make_buffers(self) -> None:
        config, columns = self.config, self.config.num_experts + self.num_ranks
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=self.device)
        self._workspace[8:16] = 255  # Workspace::input_error: none
        self._slots = torch.empty(config.max_tokens * config.num_topk * 2, dtype=torch.int32, device=self.device)
        self._block_base = torch.empty(self.num_sms * columns, dtype=torch.int32, device=self.device)
        self._tail_words = self.num_ranks**2 + self._experts_per_rank + config.num_experts
        self._result_bytes = align_up(sizeof(HostResult) + 4 * self._tail_words, 64)
        self._pinned = torch.zeros(
            align_up(sizeof(FaultNote), 64) + _RESULTS * self._result_bytes, dtype=torch.uint8, pin_memory=True
        )
        self._board = FaultNote.from_address(self._pinned.data_ptr())
        torch.cuda.current_stream().synchronize()

    def _make_mesh(self, regions: Regions) -> Mesh:
        mesh = Mesh(
            rank=self.rank,
            num_ranks=self.num_ranks,
            num_experts=self.config.num_experts,
            num_topk=self.config.num_topk,
            max_tokens=self.config.max_tokens,
            experts_per_rank=self._experts_per_rank,
            timeout_ns=int(self.config.timeout_s * 1e9),
            exchange_row_bytes=regions.exchange_row_bytes,
            board=self._pinned.data_ptr(),
            workspace=self._workspace.data_ptr(),
            **regions.offsets,
        )
        mesh.base[: self.num_ranks] = self.arena.base
        return mesh

    def barrier_send(self) -> PendingOp:
        """Enqueues an operation that ends when all ranks' devices have come to it."""
        self._start()
        words = CallWords(kind=KINDS["barrier"])
        pending = self._exchange(words.kind, ExchangeCall(call=words), None, 0)
        return self._enqueued(pending)

    def barrier(self) -> None:
        """Returns when the devices of all ranks have come here."""
        pending = self.barrier_send()
        self._finish(pending)

    def close(self) -> None:
        """All ranks come, then memory is freed. Idempotent; after a fault it waits for nobody."""
        if self._is_closed:
            return
        self._is_closed = True
        self._stream.synchronize()
        self._unsettled.clear()
        self._in_flight.clear()
        self.arena.close(None if self._is_faulty else self.boot, self._timeout_s)

    def check(self) -> None:
        """Raises CommTimeout if a kernel of this rank or of a peer missed a deadline."""
        if self._board.kind:
            self._is_faulty = True
            raise fault_error(self._board, self.rank, self.config.timeout_s)

    def _start(self) -> None:
        if self._is_closed:
            raise ConfigError("this Runtime is closed")
        self.check()
        self._in_flight = [pending for pending in self._in_flight if not pending.done.query()]
        for pending in list(self._unsettled):
            # The grant of a dispatch is the whole heap until its sizes are known; result slots are used in turn.
            if pending.grant is not None or pending.epoch + _RESULTS <= self._epoch + 1:
                self._settle(pending)
        # Inputs are ready, and so is memory that results gave back: their readers are on the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def _launch(self, name: str, blocks: int, threads: int, shared_bytes: int, call: ctypes.Structure) -> None:
        if self.marks is None:
            self._kernels[name].launch(self._stream.cuda_stream, blocks, threads, shared_bytes, self._mesh, call)
            return
        new_event: Any = torch.cuda.Event
        start = self._stream.record_event(new_event(enable_timing=True))
        self._kernels[name].launch(self._stream.cuda_stream, blocks, threads, shared_bytes, self._mesh, call)
        self.marks.append((name, start, self._stream.record_event(new_event(enable_timing=True))))

    def _exchange(self, kind: int, call: ExchangeCall, grant: Slab | None, tokens_per_block: int) -> PendingOp:
        """Enqueues the first kernel of an operation."""
        self._epoch += 1
        call.slots, call.block_base = self._slots.data_ptr(), self._block_base.data_ptr()
        call.result = self._result_address(self._epoch)
        if grant is not None:
            call.grant_offset, call.grant_bytes = grant.offset, grant.num_bytes
        blocks = -(-call.num_tokens // tokens_per_block) if tokens_per_block and call.num_tokens else 1
        self._launch("exchange", blocks, _EXCHANGE_THREADS, self._exchange_shared, call)
        name = next(name for name, code in KINDS.items() if code == kind)
        return PendingOp(name, self._epoch, None, grant=grant)

    def _reject(self, kind: str, error: ConfigError) -> PendingOp:
        """Tells all ranks why this one does not take part; they all raise."""
        text = str(error).encode()[: TEXT_BYTES - 1]
        pending = self._exchange(
            KINDS[kind], ExchangeCall(status=4, call=CallWords(kind=KINDS[kind]), text=text), None, 0
        )
        return self._enqueued(pending)

    def _enqueued(self, pending: PendingOp) -> PendingOp:
        pending.done = self._stream.record_event()
        self._unsettled.append(pending)
        self._in_flight.append(pending)
        return pending

    def _result_address(self, epoch: int) -> int:
        first = self._pinned.data_ptr() + align_up(sizeof(FaultNote), 64)
        return first + epoch % _RESULTS * self._result_bytes

    def _settle(self, pending: PendingOp) -> None:
        """Waits until the exchange of an operation is over and keeps what it said."""
        if pending.settled is not None:
            return
        address = self._result_address(pending.epoch)
        live = HostResult.from_address(address)
        limit = time.monotonic() + self.config.timeout_s + 30
        while live.epoch != pending.epoch:
            self.check()
            if time.monotonic() > limit:
                self._is_faulty = True
                raise CommTimeout(
                    f"rank {self.rank}: the device did not start operation {pending.epoch}", rank=self.rank, peer=None,
                    channel="device", phase=pending.kind, tag=pending.epoch, expected=pending.epoch, seen=live.epoch,
                )  # fmt: skip
        copy = ctypes.string_at(address, sizeof(HostResult) + 4 * self._tail_words)
        result = HostResult.from_buffer_copy(copy)
        pending.settled = result
        self._unsettled.remove(pending)
        if result.verdict != _GO:
            self.check()
            pending.error = refusal(result, self.num_ranks, self.config.num_topk, self.config.num_experts)
            pending.grant = None
            return
        if pending.kind == "dispatch":
            self._keep_sizes(pending, result, memoryview(copy)[sizeof(HostResult) :].cast("I"))
        elif pending.kind == "cached_dispatch":
            assert pending.grant is not None
            pending.grant = pending.grant.split_front(result.landing.output_bytes)

    def _keep_sizes(self, pending: PendingOp, result: HostResult, tail: Any) -> None:
        handle, grant, landing = pending.handle, pending.grant, result.landing
        assert handle is not None and grant is not None
        ranks, experts = self.num_ranks, self._experts_per_rank
        handle.num_rows = int(landing.num_rows)
        handle.rank_counts = tuple(tuple(tail[r * ranks : (r + 1) * ranks]) for r in range(ranks))
        handle.rows_per_expert = tuple(tail[ranks * ranks : ranks * ranks + experts])
        handle.load = tuple(tail[ranks * ranks + experts :])
        pending.grant = grant.split_front(landing.output_bytes)
        handle.records = grant.split_front(landing.total_bytes - landing.records)

    def _finish(self, pending: PendingOp) -> None:
        self._settle(pending)
        torch.cuda.current_stream(self.device).wait_event(pending.done)
        if pending.error is not None:
            raise pending.error
