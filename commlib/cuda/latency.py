"""The latency regime of the GPU executor: few tokens, one hop, static slots, no host in between."""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from commlib.cuda.calls import (
    CASTS,
    DTYPES,
    check_capacity,
    check_handle,
    check_routing,
    check_rows,
    check_tensor,
)
from commlib.cuda.decode import check_decode, check_decode_rows, most_decode_rows, packet_room
from commlib.cuda.launch import (
    LATENCY_COMBINE_WARPS,
    LATENCY_WARPS,
    MAX_SHARED_BYTES,
    plan_latency_combine,
    plan_packets,
)
from commlib.cuda.operations import KernelCall
from commlib.cuda.params import LatencyCombineCall, LatencyDispatchCall
from commlib.errors import ConfigError
from commlib.executor import CombineCall, DispatchCall
from commlib.handle import Combined, Dispatched, Handle
from commlib.layout import Layout, num_scales, record_bytes

__all__ = ["LatencyHandle", "LatencyOps", "PendingLatency"]

_SEND, _RECEIVE = 1, 2
_REJECTED = 4
_MAX_UNFINISHED = 2  # generations of slots


@dataclass
class LatencyHandle:
    """What a dispatch leaves behind, all of it on the device."""

    num_tokens: int
    num_rows: int
    rows_per_expert: Any
    expert_offset: Any
    state: Any
    owners: Any
    records: Any
    epoch: int = 0


@dataclass
class PendingLatency:
    """A first half whose second half is to come."""

    kind: str
    runtime_id: int
    params: Any
    shared_bytes: int
    result: Any
    inputs: tuple[Any, ...] = field(default=())
    is_refused: bool = False


class LatencyOps:
    """Both operations of the regime, for `CudaEngine`."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._max_tokens: int = queue.config.decode_tokens or 0
        self._regions = queue.arena.regions.latency() if self._max_tokens else None
        # The device takes in the oldest operation, so the host must, too.
        self._unfinished: dict[str, deque[PendingLatency]] = {"latency dispatch": deque(), "latency combine": deque()}

    # ---- dispatch

    def dispatch_send(self, call: DispatchCall) -> PendingLatency:
        pending = self._dispatch(call, _SEND)
        self._unfinished[pending.kind].append(pending)
        return pending

    def dispatch(self, call: DispatchCall) -> Dispatched:
        result: Dispatched = self._dispatch(call, _SEND | _RECEIVE).result
        return result

    def _dispatch(self, call: DispatchCall, phases: int) -> PendingLatency:
        queue = self._queue
        queue.check_usable()
        if self._regions is None:
            raise ConfigError('regime="latency" needs a RuntimeConfig with decode_tokens')
        self._check_unfinished("latency dispatch", phases)
        try:
            pending = self._dispatch_op(call)
        except Exception:
            self._refuse(phases)
            raise
        self._launch(pending, phases)
        return pending

    def _dispatch_op(self, call: DispatchCall) -> PendingLatency:
        queue, config, fp8 = self._queue, self._queue.config, call.fp8
        alignment = check_decode(call, config)
        x, _, code = check_rows(call.x, call.scales, fp8, queue.device, config, None)
        num_tokens = int(x.shape[0])
        check_decode_rows(num_tokens, DTYPES[code], config)
        topk_idx, topk_weights = check_routing(
            call.topk_idx, call.topk_weights, queue.device, num_tokens, config.num_topk
        )
        capacity = check_capacity(call.capacity) or most_decode_rows(config, queue.num_ranks, alignment)
        handle = self._new_handle(num_tokens, capacity)
        out_dtype = torch.bfloat16 if fp8 is None else torch.float8_e4m3fn
        blocks = num_scales(config.hidden) if fp8 is not None else 0
        rows = torch.empty(capacity, config.hidden, dtype=out_dtype, device=queue.device)
        out_scales = torch.empty(capacity, blocks, dtype=torch.float32, device=queue.device) if blocks else None
        weights = torch.empty(capacity, dtype=torch.float32, device=queue.device)
        params = self._dispatch_params(x, topk_idx, topk_weights, handle, rows, out_scales, weights)
        params.alignment, params.cast, params.dtype, params.num_scales = alignment, CASTS[fp8], code, blocks
        shared_bytes = self._cut_rows(params, is_cast=fp8 is not None)
        agreed = f"{code} {fp8} {alignment} {capacity}"
        params.agreed = zlib.crc32(agreed.encode())
        public = Handle(handle, Layout.GROUPED, queue.runtime_id)
        result = Dispatched(rows, out_scales, weights, None, None, handle.rows_per_expert, public)
        inputs = (x, topk_idx, topk_weights)
        return PendingLatency("latency dispatch", queue.runtime_id, params, shared_bytes, result, inputs)

    def _dispatch_params(
        self, x: Any, topk_idx: Any, topk_weights: Any, handle: LatencyHandle, rows: Any, scales: Any, weights: Any
    ) -> LatencyDispatchCall:
        queue = self._queue
        handle.epoch = ticket = queue.next_ticket()
        return LatencyDispatchCall(
            x=x.data_ptr(),
            topk_idx=topk_idx.data_ptr(),
            topk_weights=0 if topk_weights is None else topk_weights.data_ptr(),
            refused=queue.buffers.refused_address,
            rows=rows.data_ptr(),
            scales=0 if scales is None else scales.data_ptr(),
            weights=weights.data_ptr(),
            records=handle.records.data_ptr(),
            owners=handle.owners.data_ptr(),
            rows_per_expert=handle.rows_per_expert.data_ptr(),
            expert_offset=handle.expert_offset.data_ptr(),
            state=handle.state.data_ptr(),
            ticket=ticket,
            num_tokens=x.shape[0],
            in_row_bytes=x.shape[1] * x.element_size(),
            row_bytes=rows.shape[1] * rows.element_size(),
            capacity=handle.num_rows,
        )

    def _refuse(self, phases: int) -> None:
        """The others are told that this rank's input is bad: nothing moves. In a capture nobody is told."""
        if torch.cuda.is_current_stream_capturing():
            return
        queue, config = self._queue, self._queue.config
        handle = self._new_handle(0, 1)
        nothing = torch.empty(0, config.hidden, dtype=torch.bfloat16, device=queue.device)
        choices = torch.empty(0, config.num_topk, dtype=torch.int64, device=queue.device)
        row = torch.empty(1, config.hidden, dtype=torch.bfloat16, device=queue.device)
        params = self._dispatch_params(nothing, choices, None, handle, row, None, torch.empty_like(handle.state))
        params.status, params.alignment, params.dtype = _REJECTED, 1, 1
        params.refused = 0  # it raises here
        shared_bytes = self._cut_rows(params, is_cast=False)
        pending = PendingLatency("latency dispatch", queue.runtime_id, params, shared_bytes, (row, handle))
        self._launch(pending, phases)
        if phases == _SEND:
            # The caller gets no operation whose second half it could ask for: it is done before the next one.
            self._unfinished[pending.kind].append(pending)
            pending.is_refused = True

    def _new_handle(self, num_tokens: int, capacity: int) -> LatencyHandle:
        queue, config = self._queue, self._queue.config
        ranks, experts, tokens = queue.num_ranks, config.num_experts // queue.num_ranks, self._max_tokens
        sizes = [experts, experts + 1, 1, max(1, num_tokens * config.num_topk)]
        sizes.append(ranks * tokens * (record_bytes(config.num_topk) // 4))
        words = torch.empty(sum(sizes), dtype=torch.int32, device=queue.device)
        per_expert, offset, state, owners, records = torch.split(words, sizes)
        return LatencyHandle(num_tokens, capacity, per_expert, offset, state, owners, records)

    def _cut_rows(self, params: LatencyDispatchCall, *, is_cast: bool) -> int:
        """Fills in how rows are cut; dynamic shared memory of a block."""
        room = packet_room(self._queue.config, self._queue.num_ranks)
        packets = plan_packets(params.in_row_bytes, room, is_cast=is_cast)
        params.piece_bytes, params.part_bytes = packets.piece_bytes, packets.part_bytes
        params.shared_offset = packets.shared_bytes
        return packets.shared_bytes + MAX_SHARED_BYTES - room

    # ---- combine

    def combine_send(self, call: CombineCall) -> PendingLatency:
        pending = self._combine(call, _SEND)
        self._unfinished[pending.kind].append(pending)
        return pending

    def combine(self, call: CombineCall) -> Combined:
        result: Combined = self._combine(call, _SEND | _RECEIVE).result
        return result

    def _combine(self, call: CombineCall, phases: int) -> PendingLatency:
        queue, config = self._queue, self._queue.config
        queue.check_usable()
        self._check_unfinished("latency combine", phases)
        native: LatencyHandle = check_handle(call.handle, queue.runtime_id)
        error: ConfigError | None = None
        try:
            y, weights = self._check_combine(call, native)
        except ConfigError as caught:
            # The others wait for this rank's rows: they get NaN, and this rank's caller the error.
            error, weights = caught, None
            y = torch.full((native.num_rows, config.hidden), torch.nan, dtype=torch.bfloat16, device=queue.device)
        out = torch.empty(native.num_tokens, config.hidden, dtype=torch.bfloat16, device=queue.device)
        launch = plan_latency_combine(2 * config.hidden)
        params = LatencyCombineCall(
            y=y.data_ptr(),
            weights=0 if weights is None else weights.data_ptr(),
            out=out.data_ptr(),
            records=native.records.data_ptr(),
            owners=native.owners.data_ptr(),
            state=native.state.data_ptr(),
            num_tokens=native.num_tokens,
            row_bytes=2 * config.hidden,
            piece_bytes=launch.piece_bytes,
            part_bytes=self._part_bytes(launch.piece_bytes),
        )
        result, inputs = Combined(out, None), (y, weights, call.handle)
        pending = PendingLatency("latency combine", queue.runtime_id, params, launch.shared_bytes, result, inputs)
        self._launch(pending, phases)
        if error is not None:
            if phases == _SEND:
                self._unfinished[pending.kind].append(pending)
                pending.is_refused = True
            raise error
        return pending

    def _check_combine(self, call: CombineCall, native: LatencyHandle) -> tuple[Any, Any]:
        queue = self._queue
        sizes = (native.num_rows, queue.config.hidden)
        y = check_tensor(call.y, "y", queue.device, (torch.bfloat16,), ("capacity", "hidden"), sizes)
        weights = call.weights
        if weights is not None:
            weights = check_tensor(weights, "weights", queue.device, (torch.float32,), ("capacity",), sizes[:1])
        if call.weight_grads is not None:
            raise ConfigError("the latency regime has no gradients")
        return y, weights

    def _part_bytes(self, piece_bytes: int) -> int:
        """As many parts of a row as keep all warps busy; fewer, longer ones spend less on finding out where to go.

        The same on all ranks: readers wait for the parts that writers make.
        """
        queue, config = self._queue, self._queue.config
        warps, pieces = queue.num_sms * LATENCY_COMBINE_WARPS, -(-2 * config.hidden // piece_bytes)
        rows = self._max_tokens * min(queue.num_ranks, config.num_topk)
        parts = max(1, min(pieces, warps // rows))
        return int(-(-pieces // parts) * piece_bytes)

    # ---- both

    def receive(self, pending: PendingLatency, kind: str) -> Any:
        """The second half of either, in the order of the first halves."""
        self._queue.check_usable()
        if pending.kind != kind or pending.runtime_id != self._queue.runtime_id:
            raise ConfigError(f"the operation is a {pending.kind}, not a {kind} of this Runtime")
        unfinished = self._unfinished[kind]
        self._finish_refused(kind)
        if not unfinished or unfinished[0] is not pending:
            raise ConfigError(f"the {kind} has been received already, or one that was sent before it has not")
        unfinished.popleft()
        self._launch(pending, _RECEIVE)
        return pending.result

    def _finish_refused(self, kind: str) -> None:
        unfinished = self._unfinished[kind]
        while unfinished and unfinished[0].is_refused:
            self._launch(unfinished.popleft(), _RECEIVE)

    def _check_unfinished(self, kind: str, phases: int) -> None:
        self._finish_refused(kind)
        unfinished = self._unfinished[kind]
        if phases & _RECEIVE and unfinished:
            raise ConfigError(f"a {kind} is without its second half; receive it before a whole call")
        if len(unfinished) >= _MAX_UNFINISHED:
            raise ConfigError(f"{_MAX_UNFINISHED} {kind} operations are without their second half; receive one first")

    def _launch(self, pending: PendingLatency, phases: int) -> None:
        name = pending.kind.replace(" ", "_")
        pending.params.phases = phases
        queue = self._queue
        assert self._regions is not None
        structs = (queue.mesh, self._regions, pending.params)
        warps = LATENCY_WARPS if name == "latency_dispatch" else LATENCY_COMBINE_WARPS
        queue.launch_latency(KernelCall(name, queue.num_sms, 32 * warps, pending.shared_bytes, *structs))
