"""Combines of the throughput regime: from the caller's tensors to a launch."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch

from commlib.cuda.calls import ELEMENT_BYTES, KINDS, LAYOUTS, check_handle, check_tensor
from commlib.cuda.launch import plan_combine, plan_tier_combine, settle_bytes
from commlib.cuda.memory import ALIGNMENT
from commlib.cuda.operations import CudaHandle, KernelCall, PendingOp
from commlib.cuda.params import CallWords, ExchangeCall, TierCall
from commlib.cuda.params import CombineCall as CombineParams
from commlib.executor import CombineCall
from commlib.launch_plan import combine_slot_bytes
from commlib.layout import align_up, format_bytes

__all__ = ["CombineOps"]

_logger = logging.getLogger("commlib.cuda")

_PAYLOADS = (torch.float32, torch.bfloat16)  # by code


class _Shape(NamedTuple):
    """All that a launch depends on but addresses and numbers of tokens."""

    code: int
    layout: str
    has_grads: bool
    capacity: int


class _Template:
    """The structs of a launch, filled but for addresses; see the one of dispatches."""

    def __init__(self, queue: Any, shape: _Shape) -> None:
        config = queue.config
        row_bytes = config.hidden * ELEMENT_BYTES[shape.code]
        self.slot_bytes = combine_slot_bytes(
            config.hidden, config.num_topk, ELEMENT_BYTES[shape.code], has_grads=shape.has_grads
        )
        if queue.tiers is None:
            launch = plan_combine(row_bytes, queue.tuning)
        else:
            launch = plan_tier_combine(row_bytes, ELEMENT_BYTES[shape.code], queue.tuning)
        self.params = CombineParams(
            piece_bytes=launch.piece_bytes,
            slot_bytes=self.slot_bytes,
            row_bytes=row_bytes,
            layout=LAYOUTS[shape.layout],
            final_warps=queue.tuning.rows_final_warps if shape.layout == "rows" else queue.tuning.final_warps,
        )
        self.exchange = ExchangeCall(
            slot_bytes=self.slot_bytes,
            call=CallWords(kind=KINDS["combine"], dtype=shape.code, has_grads=shape.has_grads, capacity=shape.capacity),
        )
        head = settle_bytes(config.num_experts, queue.num_ranks)
        self.tier: TierCall | None = None
        structs = [queue.mesh, self.exchange, self.params]
        if queue.tiers is not None:
            plan = queue.tiers.plan
            self.tier = TierCall(**plan.kernel_fields(), slot_bytes=self.slot_bytes)
            structs.append(self.tier)
        name = "combine_bf16" if shape.code == 1 else "combine_f32"
        self.kernel = KernelCall(
            name if self.tier is None else f"tier_{name}",
            queue.num_local_sms,
            32 * launch.warps,
            max(launch.shared_bytes, head),
            *structs,
        )


class CombineOps:
    """For `CudaEngine`."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._templates: dict[_Shape, _Template] = {}
        self._has_warned = False

    def issue(self, call: CombineCall, *, is_split: bool) -> PendingOp:
        queue = self._queue
        queue.prepare()
        try:
            pending = self._make(call)
        except Exception as error:  # also what nobody foresaw: raised here, it would strand the other ranks
            rejected: PendingOp = queue.reject("combine", error, is_split=is_split)
            return rejected
        pending.is_split = is_split
        queue.issue(pending)
        if pending.is_lazy:
            self._check_room(pending)
            pending.grant = None  # later operations come behind this one
        return pending

    def _check_room(self, pending: PendingOp) -> None:
        """Nobody waits for the verdict: if the device finds too little, NaN comes, and an error when somebody asks."""
        grant, most = pending.grant, pending.grant_bytes
        if self._has_warned or grant is None or most is None or grant.num_bytes >= most:
            return
        self._has_warned = True
        _logger.warning(
            "a combine may take %s in one piece and finds %s: give the Runtime more arena_bytes",
            format_bytes(most),
            format_bytes(grant.num_bytes),
        )

    def _make(self, call: CombineCall) -> PendingOp:
        queue, hidden, topk = self._queue, self._queue.config.hidden, self._queue.config.num_topk
        native: CudaHandle = check_handle(call.handle, queue.runtime_id)
        queue.use_handle(native)
        device, rows, weights, grads = queue.device, native.num_rows, call.weights, call.weight_grads
        y = check_tensor(call.y, "y", device, _PAYLOADS, ("num_rows", "hidden"), (rows, hidden))
        if weights is not None:
            weights = check_tensor(weights, "weights", device, (torch.float32,), ("num_rows",), (rows,))
        if grads is not None:
            sizes = (rows,) if native.layout == "grouped" else (rows, topk)
            labels = ("num_rows", "num_topk")[: len(sizes)]
            grads = check_tensor(grads, "weight_grads", device, (torch.float32,), labels, sizes)
        shape = _Shape(_PAYLOADS.index(y.dtype), native.layout, grads is not None, native.capacity)
        template = self._templates.get(shape)
        if template is None:
            template = self._templates[shape] = _Template(queue, shape)
        out = torch.empty(native.num_tokens, hidden, dtype=y.dtype, device=device)
        out_grads = None
        if grads is not None:
            out_grads = torch.empty(native.num_tokens, topk, dtype=torch.float32, device=device)
        params, exchange = template.params, template.exchange
        params.y, params.out = y.data_ptr(), out.data_ptr()
        params.weights = 0 if weights is None else weights.data_ptr()
        # Not 0 without rows: 0 says that there are none on any rank, and a rail forwards those of others.
        params.weight_grads = 0 if grads is None else grads.data_ptr() or queue.buffers.slots_address
        params.out_weight_grads = 0 if out_grads is None else out_grads.data_ptr()
        params.records, params.routes = native.records_address, native.routes_address
        params.num_tokens = native.num_tokens
        exchange.tables = native.tables
        if (tier := template.tier) is not None:
            tier.num_tokens, tier.node_counts = native.num_tokens, native.tables.node_counts
            tier.slot_tokens, tier.token_slots, tier.forward_records = native.tier_addresses
        exchange.call.handle_epoch = native.epoch
        pending = PendingOp("combine", queue.runtime_id, exchange)
        pending.is_lazy, pending.data = native.capacity != 0, template.kernel
        # With a capacity the most there can be: if there is less, the device finds out whether it will do.
        pending.grant_bytes = self._landing_bytes(native, template.slot_bytes)
        pending.inputs, pending.out, pending.out_weight_grads = (y, weights, grads, None, call.handle), out, out_grads
        return pending

    def _landing_bytes(self, native: CudaHandle, slot_bytes: int) -> int:
        """Room for the partial rows of the own tokens: one per other rank that holds experts of a token."""
        queue = self._queue
        if queue.tiers is not None:
            return _tier_landing_bytes(queue, native, slot_bytes)
        if not native.capacity:
            counts = native.rank_counts[queue.rank]
            return sum(align_up(count * slot_bytes, ALIGNMENT) for r, count in enumerate(counts) if r != queue.rank)
        most = min(queue.num_ranks - 1, queue.config.num_topk) * native.num_tokens
        return align_up(most * slot_bytes, ALIGNMENT) + int(queue.num_ranks) * ALIGNMENT


def _tier_landing_bytes(queue: Any, native: CudaHandle, slot_bytes: int) -> int:
    """What `place_partials` in native/cuda/tier_plan.cuh needs: own partial rows, rows from other nodes, and partial
    rows of the tokens for which this rank is the rail."""
    topology, rank = queue.topology, queue.rank
    here, sources = topology.ranks_of_node(topology.node(rank)), topology.in_sources(rank)
    if not native.capacity:
        counts = [native.rank_counts[source][r] for source in (rank, *sources) for r in here if r != source]
        counts += [count for node, count in enumerate(native.node_counts[rank]) if node != topology.node(rank)]
        return sum(align_up(count * slot_bytes, ALIGNMENT) for count in counts)
    topk = int(queue.config.num_topk)
    own_most, away_most = min(len(here) - 1, topk), min(topology.num_nodes - 1, topk)
    most = native.num_tokens * (own_most + away_most) + len(sources) * native.most_tokens * min(len(here), topk)
    pieces: int = len(here) * (1 + len(sources)) + topology.num_nodes
    return align_up(most * slot_bytes, ALIGNMENT) + pieces * ALIGNMENT
