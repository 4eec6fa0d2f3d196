"""Dispatch and combine on the GPUs of one node.

An operation is one kernel: its head settles on every rank where everything goes, its body moves the rows. The host only
waits if the caller wants to know sizes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from commlib.cuda.calls import (
    CASTS,
    DTYPES,
    ELEMENT_BYTES,
    KINDS,
    LAYOUTS,
    check_capacity,
    check_handle,
    check_routing,
    check_rows,
    check_tensor,
)
from commlib.cuda.landing import dispatch_landing
from commlib.cuda.latency import LatencyHandle, LatencyOps, PendingLatency
from commlib.cuda.launch import Launch, plan_combine, plan_dispatch, settle_bytes
from commlib.cuda.memory import ALIGNMENT, Slab
from commlib.cuda.operations import ArenaBytes, CudaHandle, KernelCall, PendingOp
from commlib.cuda.params import CallWords, ExchangeCall, Landing, Tables
from commlib.cuda.params import CombineCall as CombineParams
from commlib.cuda.params import DispatchCall as DispatchParams
from commlib.cuda.queue import OpQueue
from commlib.errors import CapacityError, ConfigError
from commlib.executor import CombineCall, DispatchCall
from commlib.handle import Combined, Dispatched, Handle
from commlib.layout import Layout, align_up, format_bytes, num_scales

__all__ = ["CudaEngine"]


class CudaEngine(OpQueue):
    """`Executor` of CUDA tensors, among ranks that share memory over NVLink or a GPU.

    Construction is collective, and so is every operation; all ranks issue them in the same order. Not thread-safe.

    Args:
        device: torch device of this rank.
        boot: the ranks of one node.
        config: shape and limits.
        topology: one node.
        runtime_id: of the Runtime, in its handles.
        connect_timeout_s: seconds within which all ranks must have come.
        tuning: shapes of the kernels; no influence on results.

    Raises:
        ConfigError: sizes that do not fit together.
        CapacityError: the device has too little memory.
    """

    # ---- dispatch

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._latency = LatencyOps(self)

    def dispatch(self, call: DispatchCall) -> Dispatched:
        if _is_latency(call):
            return self._latency.dispatch(call)
        return self.dispatch_recv(self._dispatch_issue(call, is_split=False))

    def dispatch_send(self, call: DispatchCall) -> PendingOp | PendingLatency:
        if _is_latency(call):
            return self._latency.dispatch_send(call)
        return self._dispatch_issue(call, is_split=True)

    def dispatch_recv(self, pending: Any) -> Dispatched:
        if isinstance(pending, PendingLatency):
            result: Dispatched = self._latency.receive(pending, "latency dispatch")
            return result
        self._finish(pending, ("dispatch", "cached_dispatch"))
        native, slab, landing = pending.handle, pending.grant, self._landing_of(pending)
        assert native is not None and slab is not None
        num_rows, hidden, num_topk = native.num_rows, self.config.hidden, self.config.num_topk
        self._slabs[slab.address] = slab
        # One tensor holds the slab, the results are views of it.
        whole = self._bytes_of(slab, int(landing.output_bytes))

        def view(offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
            return whole[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

        x = view(landing.rows, getattr(torch, pending.dtype), (num_rows, hidden))
        scales = row_weights = topk_idx = topk_weights = None
        if pending.dtype == "float8_e4m3fn":
            scales = view(landing.scales, torch.float32, (num_rows, num_scales(hidden)))
        if pending.public_handle is None and native.layout == "grouped":
            row_weights = view(landing.weights, torch.float32, (num_rows,))
        elif pending.public_handle is None:
            topk_weights = view(landing.weights, torch.float32, (num_rows, num_topk))
            topk_idx = view(landing.topk_idx, torch.int64, (num_rows, num_topk))
        handle = pending.public_handle or Handle(native, Layout(native.layout), self._id)
        return Dispatched(x, scales, row_weights, topk_idx, topk_weights, handle.num_tokens_per_expert, handle)

    def _dispatch_issue(self, call: DispatchCall, *, is_split: bool) -> PendingOp:
        self._prepare()
        kind = "dispatch" if call.handle is None else "cached_dispatch"
        try:
            pending = self._dispatch_op(kind, call)
        except (ConfigError, CapacityError) as error:
            return self._reject(kind, error, is_split=is_split)
        pending.is_split = is_split
        self._issue(pending)
        if pending.is_lazy and pending.handle is not None and pending.public_handle is None:
            # The records are the handle's; results of the caller may go before it does.
            assert pending.grant is not None
            landing = self._landing_of(pending)
            rest, pending.grant = pending.grant, pending.grant.split_front(landing.output_bytes)
            pending.handle.records = rest
            if torch.cuda.is_current_stream_capturing():
                self._captured.append(pending.grant)
        return pending

    def _dispatch_op(self, kind: str, call: DispatchCall) -> PendingOp:
        config, handle, fp8 = self.config, call.handle, call.fp8
        if handle is not None:
            native: CudaHandle = check_handle(handle, self._id)
            if call.topk_idx is not None or call.topk_weights is not None or call.capacity is not None:
                raise ConfigError("dispatch by handle takes no topk_idx, no topk_weights and no capacity")
            layout, alignment, capacity = native.layout, native.alignment, native.capacity
        else:
            layout, capacity = str(call.layout), check_capacity(call.capacity)
            alignment = config.expert_alignment if call.expert_alignment is None else call.expert_alignment
            if not isinstance(alignment, int) or not 1 <= alignment < 2**31:
                raise ConfigError(f"expert_alignment={alignment!r} is not an integer in 1..2^31-1")
            if layout not in LAYOUTS:
                raise ConfigError(f'layout={layout!r} is not "grouped" or "rows"')
            self._check_rows_fit(alignment)
        x, scales, code = check_rows(
            call.x, call.scales, fp8, self.device, config, None if handle is None else native.num_tokens
        )
        topk_idx = topk_weights = None
        if handle is None:
            shape = (int(x.shape[0]), config.num_topk)
            topk_idx, topk_weights = check_routing(call.topk_idx, call.topk_weights, self.device, shape)
            native = self._new_handle(shape[0], layout, alignment, capacity)
        params = self._dispatch_params(x, scales, topk_idx, topk_weights, code, fp8, native)
        exchange = ExchangeCall(
            topk_idx=params.topk_idx,
            topk_weights=params.topk_weights,
            tables=native.tables,
            row_bytes=params.row_bytes,
            scales_bytes=4 * params.num_scales,
            num_tokens=params.num_tokens,
            tokens_per_block=params.tokens_per_block,
            count_blocks=self.num_sms if handle is None else 0,
            call=CallWords(
                kind=KINDS[kind],
                dtype=code,
                cast=params.cast,
                layout=params.layout,
                alignment=alignment,
                handle_epoch=0 if handle is None else native.epoch,
                capacity=capacity,
            ),
        )
        launch = plan_dispatch(params.in_row_bytes, self._tuning, cast_element_bytes=ELEMENT_BYTES[code] if fp8 else 0)
        params.piece_bytes = launch.piece_bytes
        pending = PendingOp(kind, self._id, exchange, handle=native, public_handle=handle, is_lazy=capacity != 0)
        pending.data = self._kernel_call("dispatch", launch, params, exchange)
        pending.inputs = (x, scales, topk_idx, topk_weights)
        pending.dtype = DTYPES[code] if fp8 is None else "float8_e4m3fn"
        if handle is None and not capacity:
            pending.grant_bytes = None
        else:
            pending.grant_bytes = needed = int(self._landing_of(pending).total_bytes)
            if capacity:
                self._check_room(needed, capacity)
        return pending

    def _check_rows_fit(self, alignment: int) -> None:
        """Rows are numbered in 32 bits."""
        config = self.config
        slots = self.num_ranks * config.max_tokens * min(config.num_topk, self._experts_per_rank)
        most = slots + self._experts_per_rank * (alignment - 1)
        if most >= 2**31:
            raise ConfigError(
                f"expert_alignment={alignment}: num_ranks={self.num_ranks} x max_tokens={config.max_tokens} tokens and "
                f"{self._experts_per_rank} local experts may need {most} rows, the limit is 2^31-1"
            )

    def _check_room(self, needed: int, capacity: int) -> None:
        """Calls that nobody waits for cannot grow the heap."""
        if needed > (available := self.arena.heap.largest_bytes):
            raise CapacityError(
                f"capacity={capacity} needs {format_bytes(needed)} in one piece, the heap has "
                f"{format_bytes(available)}; give the Runtime more arena_bytes",
                needed=needed,
                available=available,
            )

    def _dispatch_params(
        self, x: Any, scales: Any, topk_idx: Any, topk_weights: Any, code: int, fp8: str | None, native: CudaHandle
    ) -> DispatchParams:
        num_tokens, hidden, buffers = int(x.shape[0]), self.config.hidden, self._buffers
        is_busy = fp8 is not None or native.layout == "rows"
        return DispatchParams(
            x=x.data_ptr(),
            scales=_address(scales),
            # Not 0 for a fresh dispatch without tokens: 0 says "by handle".
            topk_idx=0 if topk_idx is None else topk_idx.data_ptr() or buffers.slots.data_ptr(),
            topk_weights=_address(topk_weights),
            slots=buffers.slots.data_ptr(),
            block_base=buffers.block_base.data_ptr(),
            records=native.records_address if topk_idx is None else 0,
            routes=native.routes.data_ptr(),
            tables=native.tables,
            num_tokens=num_tokens,
            tokens_per_block=max(1, -(-num_tokens // self.num_sms)),
            in_row_bytes=hidden * ELEMENT_BYTES[code],
            row_bytes=hidden * (ELEMENT_BYTES[code] if fp8 is None else 1),
            num_scales=num_scales(hidden) if fp8 is not None or scales is not None else 0,
            push_warps=self._tuning.busy_push_warps if is_busy else self._tuning.push_warps,
            push_blocks=self.num_sms,
            layout=LAYOUTS[native.layout],
            alignment=native.alignment,
            cast=CASTS[fp8],
            dtype=code,
            capacity=native.capacity,
        )

    def _kernel_call(self, name: str, launch: Launch, params: Any, exchange: ExchangeCall) -> KernelCall:
        head = settle_bytes(self.config.num_experts, self.num_ranks, exchange.count_blocks, launch.warps)
        return KernelCall(name, self.num_local_sms, 32 * launch.warps, max(launch.shared_bytes, head), params)

    def _landing_of(self, pending: PendingOp) -> Landing:
        native, exchange = pending.handle, pending.exchange
        assert native is not None
        records = self.num_ranks * self.config.max_tokens if native.capacity else sum(self._received(native))
        return dispatch_landing(
            native.num_rows,
            records,
            row_bytes=exchange.row_bytes,
            scales_bytes=exchange.scales_bytes,
            num_topk=self.config.num_topk,
            is_rows=native.layout == "rows",
            is_fresh=pending.public_handle is None,
        )

    def _received(self, native: CudaHandle) -> list[int]:
        """[source] distinct tokens that came from there."""
        return [row[self.rank] for row in native.rank_counts]

    def _new_handle(self, num_tokens: int, layout: str, alignment: int, capacity: int) -> CudaHandle:
        ranks, experts = self.num_ranks, self._experts_per_rank
        sizes = {
            "rank_counts": ranks * ranks,
            "num_rows": ranks,
            "rows_per_expert": experts,
            "expert_offset": experts + 1,
            "state": 1,
        }
        words = torch.empty(sum(sizes.values()), dtype=torch.int32, device=self.device)
        routes = torch.empty(max(1, num_tokens * self.config.num_topk) * 4, dtype=torch.int32, device=self.device)
        tables, place, first = Tables(), words.data_ptr(), 0
        for name, size in sizes.items():
            setattr(tables, name, place + 4 * first)
            if name == "rows_per_expert":
                rows_per_expert = words[first : first + size]
            first += size
        handle = CudaHandle(layout, alignment, num_tokens, capacity, tables, (words, routes), routes)
        if capacity:
            handle.num_rows, handle.rows_per_expert = capacity, rows_per_expert
        return handle

    # ---- combine

    def combine(self, call: CombineCall) -> Combined:
        if self._is_latency_handle(call.handle):
            return self._latency.combine(call)
        return self.combine_recv(self._combine_issue(call, is_split=False))

    def combine_send(self, call: CombineCall) -> PendingOp | PendingLatency:
        if self._is_latency_handle(call.handle):
            return self._latency.combine_send(call)
        return self._combine_issue(call, is_split=True)

    def combine_recv(self, pending: Any) -> Combined:
        if isinstance(pending, PendingLatency):
            result: Combined = self._latency.receive(pending, "latency combine")
            return result
        self._finish(pending, ("combine",))
        return Combined(pending.out, pending.out_weight_grads)

    def _combine_issue(self, call: CombineCall, *, is_split: bool) -> PendingOp:
        self._prepare()
        try:
            pending = self._combine_op(call)
        except ConfigError as error:
            return self._reject("combine", error, is_split=is_split)
        pending.is_split = is_split
        self._issue(pending)
        if pending.is_lazy:
            pending.grant = None  # later operations come behind this one
        return pending

    def _combine_op(self, call: CombineCall) -> PendingOp:
        config, device, topk = self.config, self.device, self.config.num_topk
        native: CudaHandle = check_handle(call.handle, self._id)
        rows, weights, weight_grads = native.num_rows, call.weights, call.weight_grads
        y = check_tensor(call.y, "y", device, DTYPES[:2], (rows, config.hidden), f"[num_rows={rows}, {config.hidden}]")
        if weights is not None:
            weights = check_tensor(weights, "weights", device, ("float32",), (rows,), f"[num_rows={rows}]")
        if weight_grads is not None:
            shape = (rows,) if native.layout == "grouped" else (rows, topk)
            weight_grads = check_tensor(weight_grads, "weight_grads", device, ("float32",), shape, str(list(shape)))
        code = DTYPES.index(str(y.dtype).removeprefix("torch."))
        row_bytes = config.hidden * ELEMENT_BYTES[code]
        slot_bytes = align_up(row_bytes + (4 * topk if weight_grads is not None else 0), 16)
        out = torch.empty(native.num_tokens, config.hidden, dtype=y.dtype, device=device)
        out_grads = None
        if weight_grads is not None:
            out_grads = torch.empty(native.num_tokens, topk, dtype=torch.float32, device=device)
        words = CallWords(
            kind=KINDS["combine"],
            dtype=code,
            has_grads=weight_grads is not None,
            handle_epoch=native.epoch,
            capacity=native.capacity,
        )
        launch = plan_combine(row_bytes, self._tuning)
        params = CombineParams(
            y=y.data_ptr(),
            weights=_address(weights),
            weight_grads=_address(weight_grads),
            out=out.data_ptr(),
            out_weight_grads=_address(out_grads),
            records=native.records_address,
            routes=native.routes.data_ptr(),
            num_tokens=native.num_tokens,
            piece_bytes=launch.piece_bytes,
            slot_bytes=slot_bytes,
            row_bytes=row_bytes,
            layout=LAYOUTS[native.layout],
            final_warps=self._tuning.final_warps,
        )
        exchange = ExchangeCall(tables=native.tables, slot_bytes=slot_bytes, call=words)
        pending = PendingOp("combine", self._id, exchange, is_lazy=native.capacity != 0)
        name = "combine_bf16" if code == 1 else "combine_f32"
        pending.data = self._kernel_call(name, launch, params, exchange)
        pending.grant_bytes = self._combine_landing_bytes(native, slot_bytes)
        pending.inputs, pending.out, pending.out_weight_grads = (y, weights, weight_grads, call.handle), out, out_grads
        return pending

    def _combine_landing_bytes(self, native: CudaHandle, slot_bytes: int) -> int:
        """Room for the partial rows of the own tokens: one per rank that holds experts of a token."""
        if not native.capacity:
            return sum(align_up(count * slot_bytes, ALIGNMENT) for count in native.rank_counts[self.rank])
        most = min(self.num_ranks, self.config.num_topk) * native.num_tokens
        return align_up(most * slot_bytes, ALIGNMENT) + self.num_ranks * ALIGNMENT

    # ---- the rest

    def _is_latency_handle(self, handle: Any) -> bool:
        return isinstance(handle, Handle) and isinstance(check_handle(handle, self._id), LatencyHandle)

    def counters(self) -> dict[str, Any]:
        """The kernels do not count."""
        return {}

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device)
        local = f", {self.num_local_sms} for local work" if self.num_local_sms != self.num_sms else ""
        return f"CUDA kernels on {self.device} ({name}), {self.num_sms} SMs{local}; peers by CUDA IPC"

    def overflowed(self) -> Any:
        """int32 [1] on the device, not 0 once a dispatch has overflowed its capacity."""
        return self._buffers.overflowed()

    def _bytes_of(self, slab: Slab, num_bytes: int) -> Any:
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return torch.as_tensor(ArenaBytes(slab.address, num_bytes, slab), device=self.device)


def _is_latency(call: DispatchCall) -> bool:
    if call.regime not in ("throughput", "latency"):
        raise ConfigError(f'regime={call.regime!r} is not "throughput" or "latency"')
    return call.regime == "latency"


def _address(tensor: Any) -> int:
    return 0 if tensor is None else int(tensor.data_ptr())
