"""The queue of operations that all ranks issue in one order: launches, verdicts, growth, faults, closing."""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from typing import Any

import torch

from commlib.bootstrap import Bootstrap
from commlib.config import RuntimeConfig
from commlib.cuda.affinity import cpus_near
from commlib.cuda.calls import KINDS, pack_handle, refusal, unpack_handle
from commlib.cuda.driver import Event
from commlib.cuda.heap_size import default_heap_bytes
from commlib.cuda.host_page import HostPage
from commlib.cuda.kernels import EXCHANGE_THREADS, Buffers, load_executor_kernels, make_mesh
from commlib.cuda.landing import dispatch_landing
from commlib.cuda.launch import Tuning, settle_bytes
from commlib.cuda.limits import check_limits, check_multiprocessors
from commlib.cuda.memory import Arena, Regions, Segment, Slab
from commlib.cuda.operations import CudaHandle, KernelCall, PendingOp
from commlib.cuda.params import TEXT_BYTES, CallWords, ExchangeCall, HostResult, sizeof
from commlib.cuda.tiers import Tiers
from commlib.cuda.watch import Watch
from commlib.errors import CapacityError, CommError, ConfigError
from commlib.launch_plan import plan_launch
from commlib.layout import align_up
from commlib.memory import MemoryReport
from commlib.topology import Topology

__all__ = ["OpQueue"]

_GO, _REFUSED, _NO_ROOM = 1, 2, 3
_GRACE_S = 30.0  # the device may be busy with other work before an operation starts
_GROWTH = 1.25


class OpQueue:
    """What every operation of `CudaEngine` shares; see there for the arguments."""

    def __init__(
        self,
        device: Any,
        boot: Bootstrap,
        config: RuntimeConfig,
        topology: Topology,
        runtime_id: int,
        connect_timeout_s: float,
        tuning: Tuning | None = None,
    ) -> None:
        config.check_ranks(boot.size)
        check_limits(config, topology, boot.size)
        self.config, self.rank, self.num_ranks = config, boot.rank, boot.size
        self.num_sms, self.num_local_sms = config.num_sms, config.num_local_sms or config.num_sms
        with torch.cuda.device(device):
            self.device = torch.device("cuda", torch.cuda.current_device())
        check_multiprocessors(self.num_local_sms, self.device)
        self._id = runtime_id
        self._ticket = 0  # of the newest operation; the same on all ranks
        self._unsettled: list[PendingOp] = []
        self._not_received: list[PendingOp] = []  # split: kernels read the inputs even if the caller drops everything
        self._captured: list[Any] = []  # slabs and handles that graphs use whenever they are replayed
        self.tuning = tuning or Tuning()
        self.topology, num_nodes = topology, topology.num_nodes
        node_ranks = topology.ranks_of_node(topology.node(boot.rank))
        self.marks: list[tuple[str, Any, Any]] | None = None  # of each kernel, for measurements: name, start, end
        self._is_closed, self._pid = False, os.getpid()
        self._experts_per_rank = config.num_experts // boot.size
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()  # makes the context
            self._page = HostPage(boot, node_ranks, connect_timeout_s)
            regions = Regions(config, boot.size, num_nodes, max(map(topology.num_local_ranks, range(boot.size))))
            heap_bytes = config.arena_bytes or default_heap_bytes(config, boot.size, num_nodes)
            has_latency = config.decode_tokens is not None and num_nodes == 1
            self._kernels = load_executor_kernels(has_latency=has_latency, has_tiers=num_nodes > 1)
            self._settle_bytes = settle_bytes(config.num_experts, boot.size)
            self.arena = Arena(boot, node_ranks, self._page, regions, heap_bytes, connect_timeout_s)
            self._stream: Any = torch.cuda.Stream(priority=-1)  # type: ignore[no-untyped-call]
            most_sms = max(self.num_sms, self.num_local_sms)
            self.buffers = Buffers(config, boot.size, most_sms, self.device, num_nodes)
            self.tiers: Tiers | None = None
            if num_nodes > 1:
                plan = plan_launch(config, topology)
                cpus = cpus_near(self.device)
                row_bytes = regions.exchange_row_bytes
                self.tiers = Tiers(boot, config, topology, plan, row_bytes, self.buffers, connect_timeout_s, cpus)
        self._watch = Watch(boot.rank, boot.size, config, self._page, self.arena, self.buffers, self.tiers)
        self.mesh = make_mesh(config, boot.rank, boot.size, regions, self.buffers)
        if self.tiers is not None:
            self.mesh.fabric = self.tiers.view.data_ptr()
        self.mesh.base[: boot.size] = self.arena.base
        self.mesh.heap[: boot.size] = self.arena.heap_base
        self._last_stream: int | None = None
        self._last_event, self._join_event = Event(), Event()
        self._slabs: weakref.WeakValueDictionary[int, Slab] = weakref.WeakValueDictionary()
        boot.barrier(connect_timeout_s)

    # ---- issuing

    def prepare(self) -> None:
        """Before an operation takes memory: what came of those before is known."""
        self.check_usable()
        # Sizes must be known before memory is granted anew, and ranks must find out in the same order.
        for pending in list(self._unsettled):
            self._settle(pending)

    def issue(self, pending: PendingOp) -> None:
        """Enqueues an operation on the current stream, or, if it is split, on the own one."""
        is_capturing = torch.cuda.is_current_stream_capturing()
        if is_capturing:
            self._check_capturable(pending)
        stream = self._enter(pending, is_capturing)
        pending.stream = stream
        self._launch_op(pending)
        if is_capturing:
            self._captured += [pending.grant, pending.handle, *pending.inputs[4:]]
        else:
            self._last_event.record(stream)
            self._last_stream = stream
            if not pending.is_lazy:
                self._unsettled.append(pending)
        if pending.is_split:
            pending.done, pending.issue_stream = Event(), self.current_stream()
            pending.done.record(stream)
            self._not_received.append(pending)
        if not is_capturing:
            self._wait_for_puts(pending)

    def _wait_for_puts(self, pending: PendingOp) -> None:
        """The newest operation's, where its caller could keep them out of the driver."""
        if self.tiers is None or not self.tiers.puts_call_driver:
            return
        limit_s = self.config.timeout_s + _GRACE_S
        if not self.tiers.wait_for_puts(self._last_event, self._watch.check_faults, limit_s):
            raise self._watch.device_silent(pending.ticket, pending.kind, pending.ticket, "end")

    def _enter(self, pending: PendingOp, is_capturing: bool) -> int:
        """The stream of an operation, behind everything that it must come after."""
        stream = current = self.current_stream()
        # Inputs are ready, and so is memory that results gave back: their readers are on the current stream.
        if pending.is_split:
            stream = self._stream.cuda_stream
            self._join_event.record(current)
            self._join_event.wait(stream)
        released = self.arena.heap.release_events
        if is_capturing:
            while released:
                released.popleft().synchronize()
            return stream
        if self._last_stream is not None and self._last_stream != stream:
            self._last_event.wait(stream)
        while released:
            released.popleft().wait(stream)
        return stream

    def current_stream(self) -> int:
        """What torch gives work to now."""
        return int(torch._C._cuda_getCurrentRawStream(self.device.index))

    def keep_records(self, pending: PendingOp, output_bytes: int) -> None:
        """Of a dispatch whose sizes the host does not learn: the records, behind the output, are the handle's; the
        caller may drop the output before it."""
        handle, whole = pending.handle, pending.grant
        assert handle is not None and whole is not None
        pending.grant = whole.split_front(output_bytes)
        handle.records = whole
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(pending.grant)

    def use_handle(self, handle: CudaHandle) -> None:
        """An operation on the current stream reads it: its memory must outlive that."""
        if handle.stream != self.current_stream():
            handle.memory.record_stream(torch.cuda.current_stream(self.device))

    def remember(self, slab: Slab) -> None:
        """For `record_stream`."""
        self._slabs[slab.address] = slab

    def _launch_op(self, pending: PendingOp) -> None:
        exchange = pending.exchange
        pending.ticket = exchange.ticket = self.next_ticket()
        if pending.handle is not None and pending.public_handle is None:
            pending.handle.epoch = pending.ticket
        heap = self.arena.heap
        if pending.data is not None:
            if pending.grant is None:
                pending.grant = heap.take_largest() if pending.grant_bytes is None else heap.take(pending.grant_bytes)
            exchange.grant_offset, exchange.grant_bytes = pending.grant.offset, pending.grant.num_bytes
        buffers = self.buffers
        exchange.slots, exchange.block_base = buffers.slots_address, buffers.block_base_address
        if pending.is_lazy:
            exchange.result, exchange.refused = buffers.scratch_address, buffers.refused_address
        else:
            exchange.result, exchange.refused = buffers.result_address(pending.ticket), 0
        data = pending.data
        if data is None:
            data = KernelCall("exchange", 1, EXCHANGE_THREADS, self._settle_bytes, self.mesh, exchange)
        self.launch(pending.stream, data)

    def launch(self, stream: int, call: KernelCall) -> None:
        kernel = self._kernels[call.name]
        if self.marks is None:
            kernel.launch(stream, call.blocks, call.threads, call.shared_bytes, call.arguments)
            return
        torch_stream: Any = torch.cuda.ExternalStream(stream, device=self.device)  # type: ignore[no-untyped-call]
        new_event: Any = torch.cuda.Event
        start = torch_stream.record_event(new_event(enable_timing=True))
        kernel.launch(stream, call.blocks, call.threads, call.shared_bytes, call.arguments)
        self.marks.append((call.name, start, torch_stream.record_event(new_event(enable_timing=True))))

    def _check_capturable(self, pending: PendingOp) -> None:
        if pending.is_split:
            raise ConfigError("halves of the throughput regime cannot be captured: capture whole calls")
        if pending.grant_bytes is None:
            raise ConfigError("a dispatch whose sizes the host must learn cannot be captured: give it a capacity")
        pending.is_lazy = True

    def reject(self, kind: str, error: Exception, *, is_split: bool) -> PendingOp:
        """Tells all ranks why this one does not take part; they all raise. Nothing is told in a capture."""
        if torch.cuda.is_current_stream_capturing():
            raise error
        text = str(error).encode("ascii", "backslashreplace")[: TEXT_BYTES - 1]
        exchange = ExchangeCall(status=4, call=CallWords(kind=KINDS[kind]), text=text)
        pending = PendingOp(kind, self._id, exchange, is_split=is_split)
        self.issue(pending)
        return pending

    # ---- what the latency regime needs

    @property
    def runtime_id(self) -> int:
        return self._id

    def next_ticket(self) -> int:
        """A number for an operation; the same on all ranks."""
        self._ticket += 1
        return self._ticket

    def check_usable(self) -> None:
        """Raises ConfigError if it is closed, or its fault."""
        if self._is_closed:
            raise ConfigError("this Runtime is closed")
        self._watch.check_faults()

    def launch_latency(self, call: KernelCall) -> None:
        """On the current stream, behind what was launched before."""
        stream, is_capturing = self.current_stream(), torch.cuda.is_current_stream_capturing()
        if not is_capturing and self._last_stream is not None and self._last_stream != stream:
            self._last_event.wait(stream)
        self.launch(stream, call)
        if not is_capturing:
            self._last_event.record(stream)
            self._last_stream = stream

    # ---- verdicts

    def _settle(self, pending: PendingOp) -> None:
        """Waits until the exchange of an operation is over and keeps what it said, errors too; grows the heap if it
        must."""
        if pending.settled or pending.is_lazy:
            return
        result, tail = self._wait_result(pending)
        if result.verdict == _NO_ROOM:
            try:
                self._grow(result)
            except CapacityError as error:
                self._keep_error(pending, error)
                return
            self._last_event.wait(pending.stream)
            pending.grant = None  # before another is taken: there may be no room for both
            self._launch_op(pending)
            self._last_event.record(pending.stream)
            self._last_stream = pending.stream
            if pending.is_split:
                pending.done.record(pending.stream)
            self._wait_for_puts(pending)
            result, tail = self._wait_result(pending)
        if result.verdict != _GO:
            self._watch.check_faults()
            reason = refusal(result, self.num_ranks, self.config.num_topk, self.config.num_experts)
            self._keep_error(pending, reason)
            return
        self._unsettled.remove(pending)
        pending.settled = True
        if pending.kind == "dispatch":
            self._keep_sizes(pending, result, tail)
        elif pending.kind == "combine":
            pending.grant = None  # later operations come behind this one

    def _keep_error(self, pending: PendingOp, error: Exception) -> None:
        """For whoever finishes the operation."""
        self._unsettled.remove(pending)
        pending.settled, pending.error, pending.grant = True, error, None

    def _wait_result(self, pending: PendingOp) -> tuple[HostResult, Any]:
        address = self.buffers.result_address(pending.ticket)
        live = HostResult.from_address(address)
        limit = time.monotonic() + self.config.timeout_s + _GRACE_S
        while live.ticket != pending.ticket:
            self._watch.check_faults()
            if time.monotonic() > limit:
                raise self._watch.device_silent(pending.ticket, pending.kind, live.ticket)
        copy = ctypes.string_at(address, sizeof(HostResult) + 4 * self.buffers.tail_words)
        return HostResult.from_buffer_copy(copy), memoryview(copy)[sizeof(HostResult) :].cast("I")

    def _keep_sizes(self, pending: PendingOp, result: HostResult, tail: Any) -> None:
        handle, grant, landing, call = pending.handle, pending.grant, result.landing, pending.exchange
        assert handle is not None and grant is not None
        expected = dispatch_landing(
            int(landing.num_rows), int(landing.num_records), row_bytes=call.row_bytes, scales_bytes=call.scales_bytes,
            num_topk=self.config.num_topk, is_rows=handle.layout == "rows", is_fresh=True,
        )  # fmt: skip
        assert bytes(expected) == bytes(landing), "host and device lay the output out differently"
        ranks, experts = self.num_ranks, self._experts_per_rank
        handle.num_rows = int(landing.num_rows)
        handle.rank_counts = tuple(tuple(tail[r * ranks : (r + 1) * ranks]) for r in range(ranks))
        handle.rows_per_expert = tuple(tail[ranks * ranks : ranks * ranks + experts])
        first = ranks * ranks + experts
        handle.load = tuple(tail[first : first + self.config.num_experts])
        if self.tiers is not None:
            nodes, first = self.tiers.num_nodes, first + self.config.num_experts
            handle.node_counts = tuple(tuple(tail[first + r * nodes : first + (r + 1) * nodes]) for r in range(ranks))
        pending.grant = grant.split_front(landing.output_bytes)
        handle.records = grant.split_front(landing.total_bytes - landing.records)

    def finish(self, pending: PendingOp, kinds: tuple[str, ...]) -> None:
        if not isinstance(pending, PendingOp) or pending.kind not in kinds or pending.runtime_id != self._id:
            raise ConfigError(f"{type(pending).__name__} is not a pending {kinds[0]} of this Runtime")
        self._settle(pending)
        if pending.is_split and pending in self._not_received:
            self._not_received.remove(pending)
            pending.done.wait(self.current_stream())
            if pending.issue_stream != self.current_stream():
                # Inputs and results were allocated there, and are given out again in that stream's order.
                pending.done.wait(pending.issue_stream)
        if pending.error is not None:
            raise pending.error

    def _grow(self, result: HostResult) -> None:
        """All ranks found that some heaps are too small: those are replaced. Nothing is under way but this."""
        needed, granted = int(result.needed[self.rank]), int(result.headers[self.rank].grant_bytes)
        exchange, own = ExchangeCall(call=CallWords(kind=KINDS["grow"])), None
        try:
            if any(result.needed[r] > result.headers[r].grant_bytes for r in range(self.num_ranks)) and self._captured:
                raise CapacityError(
                    "the heap cannot grow, a CUDA graph holds its addresses: give the Runtime more arena_bytes",
                    needed=needed, available=granted,
                )  # fmt: skip
            if needed > granted:
                own = Segment(align_up(int(_GROWTH * max(needed, self.arena.heap.num_bytes)), 1 << 20))
                exchange.text = pack_handle(own.handle())
        except CapacityError as error:
            exchange.status = 4
            exchange.text = str(error).encode("ascii", "backslashreplace")[: TEXT_BYTES - 1]
        stream = self._stream.cuda_stream
        pending = PendingOp("grow", self._id, exchange, stream=stream)
        self._last_event.wait(stream)
        self._launch_op(pending)
        self._last_event.record(stream)
        self._last_stream = stream
        answer, _ = self._wait_result(pending)
        if answer.verdict != _GO:
            if own is not None:
                own.free()
            self._watch.check_faults()
            reason = refusal(answer, self.num_ranks, self.config.num_topk, self.config.num_experts)
            raise CapacityError(str(reason), needed=needed, available=granted)
        handles = [unpack_handle(header.text) for header in answer.headers[: self.num_ranks]]
        try:
            self.arena.replace_heaps(own, handles)
        except CommError as error:  # the others go on: this rank cannot follow
            raise self._watch.fail(error) from None
        self.mesh.heap[: self.num_ranks] = self.arena.heap_base

    # ---- the rest

    def barrier(self) -> None:
        """Returns when the devices of all ranks have come here."""
        self.finish(self.enqueue_barrier(), ("barrier",))

    def enqueue_barrier(self, *, is_lazy: bool = False) -> PendingOp:
        """The current stream goes on when those of all ranks have come here; if it is lazy, the host never waits."""
        self.prepare()
        exchange = ExchangeCall(call=CallWords(kind=KINDS["barrier"]))
        pending = PendingOp("barrier", self._id, exchange, is_lazy=is_lazy)
        self.issue(pending)
        return pending

    def check(self) -> None:
        """Raises CommTimeout if a kernel of this rank or of a peer missed a deadline, PeerLostError if a process has
        ended, ConfigError if an operation that nobody waited for was refused."""
        if self._is_closed:
            return
        self._watch.check_faults()
        if (refusal_of := self._watch.take_refusal()) is not None:
            raise refusal_of

    def memory(self) -> MemoryReport:
        registered = 0 if self.tiers is None else self.tiers.registered_bytes
        return MemoryReport(self.arena.num_bytes + registered, self.arena.heap_bytes, self.arena.used_bytes)

    def close(self) -> None:
        """All ranks come, then memory is freed; after a fault it waits for nobody. Raises what `check` would."""
        try:
            if self._watch.fault is None:
                self.barrier()
                if (refusal_of := self._watch.take_refusal()) is not None:
                    raise refusal_of
        finally:
            self._leave()

    def abandon(self) -> None:
        """Leaves without waiting and tells the others; nothing in a forked child, which has no part in this."""
        if not self._is_closed and os.getpid() == self._pid:
            self._watch.abandon()
            self._leave()

    def _leave(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        is_quiet = self._watch.fault is None
        try:
            # A fault ends all kernels; between nodes they give commands until then.
            if self._last_stream is not None and (is_quiet or self.tiers is not None):
                self._last_event.synchronize()
        finally:
            self._unsettled.clear()
            self._not_received.clear()
            self._captured.clear()
            if self.tiers is not None:
                self.tiers.close(is_quiet=is_quiet)
            self.arena.close(is_quiet=is_quiet)
            self._page.close()

    def record_stream(self, tensor: Any, stream: Any) -> None:
        """A result is used on another stream than the one on which later operations are called."""
        address = tensor.untyped_storage().data_ptr()
        for slab in list(self._slabs.values()):
            if slab.address <= address < slab.address + slab.num_bytes:
                slab.record_stream(stream)
                return
        raise ConfigError("the tensor is no result of this Runtime")
