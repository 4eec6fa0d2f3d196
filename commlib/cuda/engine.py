"""Dispatch and combine on the GPUs of one node.

An operation is two kernels on the engine's own stream: `exchange`, which settles on every rank where everything goes,
and the data kernel, which reads that plan from device memory. The host only waits if the caller asks for sizes.
"""

from __future__ import annotations

from typing import Any

import torch

from commlib.cuda.calls import (
    CASTS,
    DTYPES,
    ELEMENT_BYTES,
    KINDS,
    LAYOUTS,
    check_routing,
    check_rows,
    check_tensor,
)
from commlib.cuda.launch import plan_combine, plan_dispatch
from commlib.cuda.memory import Slab
from commlib.cuda.operations import ArenaBytes, CudaHandle, PendingOp
from commlib.cuda.params import (
    CallWords,
    CombineCall,
    DispatchCall,
    ExchangeCall,
    Tables,
)
from commlib.cuda.queue import OpQueue
from commlib.errors import ConfigError
from commlib.handle import Combined, Dispatched, Handle
from commlib.layout import Layout, align_up, num_scales

__all__ = ["CudaEngine"]


class CudaEngine(OpQueue):
    """Dispatch and combine among ranks that share memory over NVLink or a GPU.

    Construction is collective, and so is every operation; all ranks issue them in the same order. Not thread-safe.

    Args:
        boot: the ranks of one node.
        config: shape and limits.
        device: torch device of this rank.
        num_sms: blocks, and so multiprocessors, of every kernel.
        heap_bytes: room for results and landings; None = `default_heap_bytes`.
        tuning: shapes of the kernels; no influence on results.
        connect_timeout_s: seconds within which all ranks must have come.

    Raises:
        ConfigError: sizes that do not fit together.
        CapacityError: the device has too little memory.
    """

    # ---- dispatch

    def dispatch(self, x: Any, topk_idx: Any = None, topk_weights: Any = None, **options: Any) -> Dispatched:
        """Carries every token to the ranks of its experts; arguments as `dispatch_send`, sizes known to the host."""
        return self.dispatch_recv(self.dispatch_send(x, topk_idx, topk_weights, **options))

    def dispatch_send(
        self,
        x: Any,
        topk_idx: Any = None,
        topk_weights: Any = None,
        *,
        scales: Any = None,
        handle: Handle | None = None,
        layout: Layout | str = Layout.GROUPED,
        expert_alignment: int | None = None,
        fp8: str | None = None,
    ) -> PendingOp:
        """Enqueues a dispatch behind the current stream and returns; arguments as `Runtime.dispatch`."""
        self._start()
        alignment = self.config.expert_alignment if expert_alignment is None else expert_alignment
        native: Any = getattr(handle, "_native", None)
        try:
            if handle is not None:
                self._check_handle(handle)
                assert native is not None
                if topk_idx is not None or topk_weights is not None:
                    raise ConfigError("dispatch by handle takes no topk_idx and no topk_weights")
                layout, alignment = native.layout, native.alignment
            elif not isinstance(alignment, int) or not 1 <= alignment < 2**31:
                raise ConfigError(f"expert_alignment={alignment!r} is not an integer in 1..2^31-1")
            if layout not in LAYOUTS:
                raise ConfigError(f'layout={layout!r} is not "grouped" or "rows"')
            num_tokens = None if native is None else native.num_tokens
            x, scales, code = check_rows(x, scales, fp8, self.device, self.config, num_tokens)
            if native is None:
                shape = (int(x.shape[0]), self.config.num_topk)
                topk_idx, topk_weights = check_routing(topk_idx, topk_weights, self.device, shape)
        except ConfigError as error:
            return self._reject("dispatch" if handle is None else "cached_dispatch", error)
        call = self._dispatch_call(x, scales, topk_idx, topk_weights, code, fp8)
        call.layout, call.alignment = LAYOUTS[layout], alignment
        words = CallWords(
            kind=KINDS["dispatch" if native is None else "cached_dispatch"],
            dtype=call.dtype,
            cast=call.cast,
            layout=call.layout,
            alignment=alignment,
            handle_epoch=0 if native is None else native.epoch,
        )
        launch = plan_dispatch(call.in_row_bytes, self._tuning, cast_element_bytes=ELEMENT_BYTES[code] if fp8 else 0)
        call.piece_bytes = launch.piece_bytes
        is_busy = fp8 is not None or layout == "rows"
        call.push_warps = self._tuning.busy_push_warps if is_busy else self._tuning.push_warps
        if native is None:
            grant = self.arena.heap.take_largest()
            native = self._new_handle(call.num_tokens, str(layout), alignment)
        else:
            num_bytes = native.num_rows * (call.row_bytes + 4 * call.num_scales) + 4096
            grant = self.arena.heap.take(num_bytes)
            call.records = self.arena.address(native.records.offset) if native.records is not None else 0
        call.routes, call.tables = native.routes.data_ptr(), native.tables
        exchange = ExchangeCall(
            topk_idx=call.topk_idx,
            topk_weights=call.topk_weights,
            tables=native.tables,
            row_bytes=call.row_bytes,
            scales_bytes=4 * call.num_scales,
            num_tokens=call.num_tokens,
            tokens_per_block=call.tokens_per_block,
            call=words,
        )
        pending = self._exchange(words.kind, exchange, grant, call.tokens_per_block)
        self._launch("dispatch", self.num_sms, 32 * launch.warps, launch.shared_bytes, call)
        pending.inputs = (x, scales, topk_idx, topk_weights, handle)
        pending.handle, pending.public_handle = native, handle
        pending.dtype = DTYPES[code] if fp8 is None else "float8_e4m3fn"
        return self._enqueued(pending)

    def dispatch_recv(self, pending: PendingOp) -> Dispatched:
        """The current stream waits for the dispatch, the host for its sizes.

        Raises:
            ConfigError, CapacityError: on every rank; the engine stays usable.
            CommTimeout: the engine is of no further use.
        """
        self._finish(pending)
        native, result, slab = pending.handle, pending.settled, pending.grant
        assert native is not None and result is not None and slab is not None
        landing = result.landing
        num_rows, hidden = int(landing.num_rows), self.config.hidden
        is_fresh = pending.public_handle is None

        def view(offset: int, dtype: Any, shape: tuple[int, ...]) -> Any:
            return self._view(slab, offset, dtype, shape)

        x = view(landing.rows, getattr(torch, pending.dtype), (num_rows, hidden))
        scales = row_weights = topk_idx = topk_weights = None
        if pending.dtype == "float8_e4m3fn":
            scales = view(landing.scales, torch.float32, (num_rows, num_scales(hidden)))
        if is_fresh and native.layout == "grouped":
            row_weights = view(landing.weights, torch.float32, (num_rows,))
        elif is_fresh:
            shape = (num_rows, self.config.num_topk)
            topk_weights = view(landing.weights, torch.float32, shape)
            topk_idx = view(landing.topk_idx, torch.int64, shape)
        handle = pending.public_handle or Handle(native, Layout(native.layout), self._id)
        return Dispatched(x, scales, row_weights, topk_idx, topk_weights, handle.num_tokens_per_expert, handle)

    def _dispatch_call(
        self, x: Any, scales: Any, topk_idx: Any, topk_weights: Any, code: int, fp8: str | None
    ) -> DispatchCall:
        num_tokens, hidden = int(x.shape[0]), self.config.hidden
        return DispatchCall(
            x=x.data_ptr(),
            scales=_address(scales),
            # Not 0 for a fresh dispatch without tokens: 0 says "by handle".
            topk_idx=0 if topk_idx is None else topk_idx.data_ptr() or self._slots.data_ptr(),
            topk_weights=_address(topk_weights),
            slots=self._slots.data_ptr(),
            block_base=self._block_base.data_ptr(),
            num_tokens=num_tokens,
            tokens_per_block=max(1, -(-num_tokens // self.num_sms)),
            in_row_bytes=hidden * ELEMENT_BYTES[code],
            row_bytes=hidden * (ELEMENT_BYTES[code] if fp8 is None else 1),
            num_scales=num_scales(hidden) if fp8 is not None or scales is not None else 0,
            dtype=code,
            cast=CASTS[fp8],
        )

    def _new_handle(self, num_tokens: int, layout: str, alignment: int) -> CudaHandle:
        ranks, experts = self.num_ranks, self._experts_per_rank
        sizes = {
            "rank_counts": ranks * ranks,
            "num_rows": ranks,
            "rows_per_expert": experts,
            "expert_offset": experts + 1,
        }
        words = torch.empty(sum(sizes.values()), dtype=torch.int32, device=self.device)
        routes = torch.empty(max(1, num_tokens * self.config.num_topk) * 4, dtype=torch.int32, device=self.device)
        tables, place = Tables(), words.data_ptr()
        for name, size in sizes.items():
            setattr(tables, name, place)
            place += 4 * size
        return CudaHandle(self._epoch + 1, layout, alignment, num_tokens, tables, (words, routes), routes)

    # ---- combine

    def combine(self, y: Any, handle: Handle, *, weights: Any = None, weight_grads: Any = None) -> Combined:
        """Brings the experts' outputs home; arguments as `Runtime.combine`."""
        return self.combine_recv(self.combine_send(y, handle, weights=weights, weight_grads=weight_grads))

    def combine_send(self, y: Any, handle: Handle, *, weights: Any = None, weight_grads: Any = None) -> PendingOp:
        """Enqueues a combine behind the current stream and returns."""
        self._start()
        config, device = self.config, self.device
        native: Any = getattr(handle, "_native", None)
        try:
            self._check_handle(handle)
            rows, topk = native.num_rows, config.num_topk
            y = check_tensor(y, "y", device, DTYPES[:2], (rows, config.hidden), f"[num_rows={rows}, {config.hidden}]")
            if weights is not None:
                weights = check_tensor(weights, "weights", device, ("float32",), (rows,), f"[num_rows={rows}]")
            if weight_grads is not None:
                shape = (rows,) if native.layout == "grouped" else (rows, topk)
                weight_grads = check_tensor(weight_grads, "weight_grads", device, ("float32",), shape, str(list(shape)))
        except ConfigError as error:
            return self._reject("combine", error)
        code = DTYPES.index(str(y.dtype).removeprefix("torch."))
        row_bytes = config.hidden * ELEMENT_BYTES[code]
        launch = plan_combine(row_bytes, self._tuning)
        slot_bytes = align_up(row_bytes + (4 * topk if weight_grads is not None else 0), 16)
        out = torch.empty(native.num_tokens, config.hidden, dtype=y.dtype, device=device)
        out_grads = None
        if weight_grads is not None:
            out_grads = torch.empty(native.num_tokens, topk, dtype=torch.float32, device=device)
        needed = sum(align_up(count * slot_bytes, 256) for count in native.rank_counts[self.rank])
        words = CallWords(
            kind=KINDS["combine"], dtype=code, has_grads=weight_grads is not None, handle_epoch=native.epoch
        )
        exchange = ExchangeCall(tables=native.tables, slot_bytes=slot_bytes, call=words)
        call = CombineCall(
            y=y.data_ptr(),
            weights=_address(weights),
            weight_grads=_address(weight_grads),
            out=out.data_ptr(),
            out_weight_grads=_address(out_grads),
            records=0 if native.records is None else self.arena.address(native.records.offset),
            routes=native.routes.data_ptr(),
            num_tokens=native.num_tokens,
            piece_bytes=launch.piece_bytes,
            slot_bytes=slot_bytes,
            row_bytes=row_bytes,
            layout=LAYOUTS[native.layout],
            final_warps=self._tuning.final_warps,
        )
        # The landing may be granted again at once: later operations come behind this one on the stream.
        pending = self._exchange(words.kind, exchange, self.arena.heap.take(needed), 0)
        pending.grant = None
        name = "combine_bf16" if code == 1 else "combine_f32"
        self._launch(name, self.num_sms, 32 * launch.warps, launch.shared_bytes, call)
        pending.inputs, pending.out, pending.out_weight_grads = (y, weights, weight_grads, handle), out, out_grads
        return self._enqueued(pending)

    def combine_recv(self, pending: PendingOp) -> Combined:
        """The current stream waits for the combine; the host learns whether it was refused."""
        self._finish(pending)
        return Combined(pending.out, pending.out_weight_grads)

    def _check_handle(self, handle: Any) -> None:
        if not isinstance(handle, Handle) or handle._runtime_id != self._id:
            raise ConfigError("the handle belongs to another Runtime")

    def _view(self, slab: Slab, offset: int, dtype: Any, shape: tuple[int, ...]) -> Any:
        count = 1
        for size in shape:
            count *= size
        if count == 0:
            return torch.empty(shape, dtype=dtype, device=self.device)
        memory = ArenaBytes(self.arena.address(slab.offset + offset), count * dtype.itemsize, slab)
        return torch.as_tensor(memory, device=self.device).view(dtype).view(shape)


def _address(tensor: Any) -> int:
    return 0 if tensor is None else int(tensor.data_ptr())
