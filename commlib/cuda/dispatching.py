"""Dispatches of the throughput regime: from the caller's tensors to a launch, from a launch to results."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch

from commlib.cuda.calls import (
    CASTS,
    DTYPES,
    ELEMENT_BYTES,
    KINDS,
    LAYOUTS,
    check_alignment,
    check_capacity,
    check_handle,
    check_routing,
    check_rows,
)
from commlib.cuda.decode import check_decode, check_decode_rows, most_decode_rows
from commlib.cuda.landing import dispatch_landing
from commlib.cuda.launch import plan_dispatch, settle_bytes
from commlib.cuda.operations import ArenaBytes, CudaHandle, KernelCall, PendingOp
from commlib.cuda.params import CallWords, ExchangeCall, Landing, Tables, TierCall
from commlib.cuda.params import DispatchCall as DispatchParams
from commlib.errors import CapacityError, ConfigError
from commlib.executor import DispatchCall
from commlib.handle import Dispatched, Handle
from commlib.launch_plan import dispatch_slot
from commlib.layout import Layout, format_bytes, most_rows, num_scales

__all__ = ["DispatchOps"]

_MAX_TEMPLATES = 256
_PAYLOADS = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)  # by code


class _Shape(NamedTuple):
    """All that a launch depends on but addresses."""

    is_fresh: bool
    num_tokens: int
    code: int
    fp8: str | None
    layout: str
    alignment: int
    capacity: int


class _Template:
    """The structs of a launch, filled but for addresses. Used again: launches copy them, and an operation that may
    have to be launched twice is settled before the next one begins."""

    def __init__(self, queue: Any, shape: _Shape) -> None:
        config = queue.config
        self.shape = shape
        is_cast, is_fp8 = shape.fp8 is not None, shape.fp8 is not None or shape.code == 2
        self.dtype = _PAYLOADS[2 if is_fp8 else shape.code]
        self.num_scales = num_scales(config.hidden) if is_fp8 else 0
        in_row_bytes = config.hidden * ELEMENT_BYTES[shape.code]
        launch = plan_dispatch(
            in_row_bytes, queue.tuning, cast_element_bytes=ELEMENT_BYTES[shape.code] if is_cast else 0
        )
        tuning = queue.tuning
        push_warps = tuning.cast_push_warps if is_cast else tuning.push_warps
        if shape.layout == "rows":
            push_warps = tuning.rows_push_warps
        tokens_per_block = max(1, -(-shape.num_tokens // queue.num_sms))
        self.params = DispatchParams(
            slots=queue.buffers.slots.data_ptr(),
            block_base=queue.buffers.block_base.data_ptr(),
            num_tokens=shape.num_tokens,
            tokens_per_block=tokens_per_block,
            in_row_bytes=in_row_bytes,
            row_bytes=config.hidden if is_fp8 else in_row_bytes,
            num_scales=self.num_scales,
            piece_bytes=launch.piece_bytes,
            push_warps=push_warps,
            push_blocks=queue.num_sms,
            layout=LAYOUTS[shape.layout],
            alignment=shape.alignment,
            cast=CASTS[shape.fp8],
            dtype=shape.code,
            capacity=shape.capacity,
        )
        self.exchange = ExchangeCall(
            row_bytes=self.params.row_bytes,
            scales_bytes=4 * self.num_scales,
            num_tokens=shape.num_tokens,
            tokens_per_block=tokens_per_block,
            count_blocks=queue.num_sms if shape.is_fresh else 0,
            call=CallWords(
                kind=KINDS["dispatch" if shape.is_fresh else "cached_dispatch"],
                dtype=shape.code,
                cast=self.params.cast,
                layout=self.params.layout,
                alignment=shape.alignment,
                capacity=shape.capacity,
            ),
        )
        head = settle_bytes(config.num_experts, queue.num_ranks, self.exchange.count_blocks, tokens_per_block)
        shared_bytes = max(launch.shared_bytes, head)
        self.tier: TierCall | None = None
        structs = [queue.mesh, self.exchange, self.params]
        if queue.tiers is not None:
            self.tier = _tier_call(queue, shape, self.params)
            structs.append(self.tier)
        name = "dispatch" if self.tier is None else "tier_dispatch"
        self.kernel = KernelCall(name, queue.num_local_sms, 32 * launch.warps, shared_bytes, *structs)
        self._lay_out_handle(queue, shape)
        self.landing: Landing | None = None
        if shape.capacity:
            self.landing = self.landing_of(queue, shape, shape.capacity, queue.num_ranks * config.max_tokens)

    def _lay_out_handle(self, queue: Any, shape: _Shape) -> None:
        """Where the parts of a handle's memory lie: tables, in bytes; then, in words, routes and what tiers keep."""
        config, topk = queue.config, queue.config.num_topk
        ranks, experts = queue.num_ranks, config.num_experts // queue.num_ranks
        nodes = 0 if queue.tiers is None else queue.tiers.num_nodes
        sizes = {
            "rank_counts": ranks * ranks,
            "num_rows": ranks,
            "rows_per_expert": experts,
            "expert_offset": experts + 1,
            "node_counts": ranks * nodes,
            "state": 1,
        }
        ends = list(accumulate(sizes[field[0]] for field in Tables._fields_))
        self.table_places = [4 * place for place in (0, *ends[:-1])]
        self.first_count = ranks * ranks + ranks
        self.num_experts = experts
        self.routes_place = -(-ends[-1] // 4) * 4
        self.num_words = self.routes_place + max(1, shape.num_tokens * topk) * 4
        self.tier_places: list[int] = []
        if queue.tiers is not None:
            # The host does not know how many tokens it will forward: room for as many as there can be.
            forwarded = queue.tiers.num_in_sources * config.max_tokens * (4 + 4 * topk)
            for size in (nodes * shape.num_tokens, nodes * shape.num_tokens, forwarded):
                self.tier_places.append(self.num_words)
                self.num_words += -(-size // 4) * 4

    def landing_of(self, queue: Any, shape: _Shape, num_rows: int, num_records: int) -> Landing:
        return dispatch_landing(
            num_rows,
            num_records,
            row_bytes=self.params.row_bytes,
            scales_bytes=4 * self.num_scales,
            num_topk=queue.config.num_topk,
            is_rows=shape.layout == "rows",
            is_fresh=shape.is_fresh,
        )


def _tier_call(queue: Any, shape: _Shape, params: DispatchParams) -> TierCall:
    """All but addresses. A slot: row, scales, then, in a fresh dispatch, the record and its numbers."""
    hidden, plan = queue.config.hidden, queue.tiers.plan
    slot = dispatch_slot(hidden, queue.config.num_topk, params.row_bytes // hidden, is_fresh=shape.is_fresh)
    return TierCall(
        num_tokens=shape.num_tokens,
        **plan.kernel_fields(),
        is_fresh=shape.is_fresh,
        **slot._asdict(),
    )


class DispatchOps:
    """For `CudaEngine`."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._templates: dict[_Shape, _Template] = {}

    def issue(self, call: DispatchCall, *, is_split: bool) -> PendingOp:
        queue = self._queue
        queue.prepare()
        try:
            pending = self._make(call)
        except Exception as error:  # also what nobody foresaw: raised here, it would strand the other ranks
            kind = "dispatch" if call.handle is None else "cached_dispatch"
            rejected: PendingOp = queue.reject(kind, error, is_split=is_split)
            return rejected
        pending.is_split = is_split
        queue.issue(pending)
        template = pending.template
        if template.shape.is_fresh and template.landing is not None:
            queue.keep_records(pending, int(template.landing.output_bytes))
        return pending

    def result(self, pending: PendingOp) -> Dispatched:
        """Views of the landing, which they keep."""
        native, slab, template = pending.handle, pending.grant, pending.template
        assert native is not None and slab is not None
        shape, landing = template.shape, template.landing
        if landing is None:
            received = sum(row[self._queue.rank] for row in native.rank_counts)
            landing = template.landing_of(self._queue, shape, native.num_rows, received)
        self._queue.remember(slab)
        num_rows, hidden, num_topk = native.num_rows, self._queue.config.hidden, self._queue.config.num_topk
        size, device = int(landing.output_bytes), self._queue.device
        # One tensor holds the slab, the results are views of it.
        if size:
            whole = torch.as_tensor(ArenaBytes(slab.address, size, slab), device=device)
        else:
            whole = torch.empty(0, dtype=torch.uint8, device=device)
        x = _view(whole.view(template.dtype), 0, num_rows, hidden)
        scales = row_weights = topk_idx = topk_weights = None
        floats: Any = whole.view(torch.float32) if template.num_scales or shape.is_fresh else None
        if template.num_scales:
            scales = _view(floats, landing.scales, num_rows, template.num_scales)
        if shape.is_fresh and shape.layout == "grouped":
            row_weights = floats.as_strided((num_rows,), (1,), landing.weights // 4)
        elif shape.is_fresh:
            topk_weights = _view(floats, landing.weights, num_rows, num_topk)
            topk_idx = _view(whole.view(torch.int64), landing.topk_idx, num_rows, num_topk)
        handle = pending.public_handle or Handle(native, Layout(native.layout), self._queue.runtime_id)
        return Dispatched(x, scales, row_weights, topk_idx, topk_weights, handle.num_tokens_per_expert, handle)

    def _make(self, call: DispatchCall) -> PendingOp:
        queue, config, handle, fp8 = self._queue, self._queue.config, call.handle, call.fp8
        native: CudaHandle | None = None
        if handle is not None:
            native = check_handle(handle, queue.runtime_id)
            if call.topk_idx is not None or call.topk_weights is not None or call.capacity is not None:
                raise ConfigError("dispatch by handle takes no topk_idx, no topk_weights and no capacity")
            assert native is not None
            queue.use_handle(native)
            layout, alignment, capacity = native.layout, native.alignment, native.capacity
        else:
            layout, alignment, capacity = self._check_options(call)
        x, scales, code = check_rows(
            call.x, call.scales, fp8, queue.device, config, None if native is None else native.num_tokens
        )
        if call.regime == "latency":
            check_decode_rows(x.shape[0], DTYPES[code], config)
        shape = _Shape(native is None, x.shape[0], code, fp8, layout, alignment, capacity)
        template = self._templates_of(shape)
        params, exchange = template.params, template.exchange
        topk_idx = topk_weights = None
        if native is None:
            topk_idx, topk_weights = check_routing(
                call.topk_idx, call.topk_weights, queue.device, shape.num_tokens, config.num_topk
            )
            native = self._new_handle(shape, template)
            # A capacity that the caller gives says nothing of the others' regime.
            is_decode = call.regime == "latency" and call.capacity is None
            native.most_tokens = config.decode_tokens if is_decode else config.max_tokens
            # Not 0 without tokens: 0 says "by handle".
            params.topk_idx = exchange.topk_idx = topk_idx.data_ptr() or params.slots
            params.topk_weights = exchange.topk_weights = 0 if topk_weights is None else topk_weights.data_ptr()
        else:
            params.records = native.records_address
            exchange.call.handle_epoch = native.epoch
        if template.tier is not None:
            tier, exchange.node_masks = template.tier, queue.buffers.node_masks.data_ptr()
            tier.node_masks, tier.node_counts = exchange.node_masks, native.tables.node_counts
            tier.slot_tokens, tier.token_slots, tier.forward_records = native.tier_addresses
        params.x, params.scales = x.data_ptr(), 0 if scales is None else scales.data_ptr()
        params.routes = native.routes_address
        params.tables = exchange.tables = native.tables
        pending = PendingOp("dispatch" if shape.is_fresh else "cached_dispatch", queue.runtime_id, exchange)
        pending.template, pending.handle, pending.public_handle = template, native, handle
        pending.is_lazy, pending.data = capacity != 0, template.kernel
        pending.inputs = (x, scales, topk_idx, topk_weights, handle)
        self._take_room(pending, shape, template)
        return pending

    def _check_options(self, call: DispatchCall) -> tuple[str, int, int]:
        config, layout = self._queue.config, call.layout
        if call.regime == "latency":
            # Between nodes: one node has kernels of its own for it.
            alignment = check_decode(call, config)
            most = most_decode_rows(config, self._queue.num_ranks, alignment)
            return "grouped", alignment, check_capacity(call.capacity) or most
        if call.regime != "throughput":
            raise ConfigError(f'regime={call.regime!r} is not "throughput" or "latency"')
        alignment = check_alignment(call.expert_alignment, config, num_bits=31)
        if layout not in LAYOUTS:
            raise ConfigError(f'layout={layout!r} is not "grouped" or "rows"')
        return str(layout), alignment, check_capacity(call.capacity)

    def _templates_of(self, shape: _Shape) -> _Template:
        template = self._templates.get(shape)
        if template is None:
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            self._check_row_numbers(shape.alignment)
            template = self._templates[shape] = _Template(self._queue, shape)
        return template

    def _check_row_numbers(self, alignment: int) -> None:
        """Rows are numbered in 32 bits."""
        config, num_ranks = self._queue.config, self._queue.num_ranks
        experts = config.num_experts // num_ranks
        most = most_rows(num_ranks * config.max_tokens, config.num_topk, experts, alignment)
        if most >= 2**31:
            raise ConfigError(
                f"expert_alignment={alignment}: num_ranks={num_ranks} x max_tokens={config.max_tokens} "
                f"tokens and {experts} local experts may need {most} rows, the limit is 2^31-1"
            )

    def _take_room(self, pending: PendingOp, shape: _Shape, template: _Template) -> None:
        """Says how much room the landing takes, if anybody knows. Calls that nobody waits for cannot grow the heap:
        they get it here."""
        if template.landing is not None:
            needed = pending.grant_bytes = int(template.landing.total_bytes)
            pending.grant = self._queue.arena.heap.take(needed)
            if (available := pending.grant.num_bytes) < needed:
                pending.grant = None  # whoever keeps the error keeps `pending`
                raise CapacityError(
                    f"capacity={shape.capacity} needs {format_bytes(needed)} in one piece, the heap has "
                    f"{format_bytes(available)}; give the Runtime more arena_bytes",
                    needed=needed,
                    available=available,
                )
        elif shape.is_fresh:
            pending.grant_bytes = None
        else:
            assert pending.handle is not None
            landing = template.landing_of(self._queue, shape, pending.handle.num_rows, 0)
            pending.grant_bytes = int(landing.total_bytes)

    def _new_handle(self, shape: _Shape, template: _Template) -> CudaHandle:
        words = torch.empty(template.num_words, dtype=torch.int32, device=self._queue.device)
        first = words.data_ptr()
        tables = Tables(*[first + place for place in template.table_places])
        handle = CudaHandle(
            shape.layout, shape.alignment, shape.num_tokens, shape.capacity, tables, words,
            first + 4 * template.routes_place, self._queue.current_stream(),
        )  # fmt: skip
        handle.tier_addresses = tuple(first + 4 * place for place in template.tier_places)
        if shape.capacity:
            handle.num_rows = shape.capacity
            handle.rows_per_expert = words[template.first_count : template.first_count + template.num_experts]
        return handle


def _view(whole: Any, offset: int, rows: int, columns: int) -> Any:
    """`offset` is in bytes."""
    return whole.as_strided((rows, columns), (columns, 1), offset // whole.element_size())
