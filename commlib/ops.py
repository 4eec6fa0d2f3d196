"""Dispatch and combine as torch autograd operations.

The backward of a dispatch is a combine, the backward of a combine is a dispatch by the same handle. Both are
collective, so they run on every rank whatever its inputs are: no tokens, no rows, frozen tensors. `combine` is tied to
its dispatch for that reason, and its result has to take part in the loss on every rank.

``torch.utils.checkpoint`` recomputes a layer by dispatching and combining once more, unless `save_communication` is
its policy: then the rows of the first time are kept. Recomputation stops as soon as everything is there that the
backward pass has saved; ranks that save different things (some experts are frozen on one of them) have to say
``early_stop=False``, or some of them recompute an operation that others do not.

``torch.compile`` breaks its graph at both functions: a compiler may move what does not depend on one another, but all
ranks have to issue their operations in one order, and sizes are known only after the exchange.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.checkpoint import CheckpointPolicy

from commlib import routing
from commlib.handle import Dispatched, Handle
from commlib.layout import Layout
from commlib.quant import Fp8Rows, dequantize
from commlib.routing import GateConfig, GateOutput
from commlib.runtime import Runtime

__all__ = ["LinkedHandle", "combine", "dispatch", "dispatch_layout", "gate", "save_communication"]


class LinkedHandle(Handle):
    """A handle whose combine's backward leads to the backward of its dispatch, even if no row connects the two."""

    def __init__(self, handle: Handle, ticket: torch.Tensor, link: torch.Tensor, keeps_fp8: bool) -> None:
        super().__init__(handle._native, handle.layout, handle._runtime_id)
        self._keeps_fp8 = keeps_fp8
        # The graph behind `link` holds a plain Handle, never this object: no reference cycle, nothing leaks.
        self._ticket = ticket
        self._link = link


def gate(
    logits: torch.Tensor, config: GateConfig, bias: torch.Tensor | None = None, *, num_sms: int | None = None
) -> GateOutput:
    """`commlib.routing.gate`, on CUDA tensors as one kernel, with gradients.

    Args:
        logits: [T, E], any floating dtype; the kernel takes FP32 and BF16.
        config: the gate.
        bias: [E] or None.
        num_sms: multiprocessors of the kernel; None = all.

    Raises:
        ConfigError: a tensor of another shape.
    """
    if logits.is_cuda and logits.dtype in (torch.float32, torch.bfloat16):
        from commlib.cuda.gate import fits, fused_gate

        if fits(config):
            return fused_gate(logits, config, bias, num_sms=num_sms)
    return routing.gate(logits, config, bias)


def dispatch_layout(
    topk_idx: torch.Tensor, num_experts: int, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`commlib.routing.dispatch_layout`, on CUDA tensors as one kernel."""
    if topk_idx.is_cuda and topk_idx.dtype == torch.int64 and num_experts % num_ranks == 0:
        from commlib.cuda.dispatch_layout import MAX_COUNTERS, MAX_RANKS, count_layout

        if num_ranks <= MAX_RANKS and num_experts + num_ranks <= MAX_COUNTERS:
            return count_layout(topk_idx, num_experts, num_ranks)
    return routing.dispatch_layout(topk_idx, num_experts, num_ranks)


def dispatch(
    runtime: Runtime,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    *,
    layout: Layout | str = Layout.GROUPED,
    expert_alignment: int | None = None,
    fp8: str | None = None,
    keep_fp8: bool = False,
    capacity: int | None = None,
) -> Dispatched:
    """`Runtime.dispatch` with gradients for `x` and `topk_weights`.

    Args:
        x: [num_tokens, hidden] FP32 or BF16, or `quant.Fp8Rows`, which travel as they are (`fp8` is None then).
        topk_idx, topk_weights, layout, expert_alignment, capacity: see `Runtime.dispatch`.
        fp8: rows travel as E4M3 with 1x128 scales and are dequantised on arrival; the gradient passes straight through.
        keep_fp8: rows that travel so are not dequantised on arrival: `x` is `quant.Fp8Rows`, the memory that dispatch
            has filled, and so are the gradient rows of `combine` with `grad_fp8`.

    Returns:
        Dispatched, its `x` in the dtype of the input (`scales` is None), its handle for `combine` of this module. The
        gradient of `row_weights` (grouped) or `topk_weights` (rows) reaches `topk_weights` of the sender.

    Raises:
        Like `Runtime.dispatch`, in forward and in backward.
    """
    call = DispatchOptions(runtime, str(layout), expert_alignment, fp8, keep_fp8, capacity)
    if torch.compiler.is_compiling():
        from commlib.graph_breaks import dispatch_eagerly

        dispatched: Dispatched = dispatch_eagerly(x, topk_idx, topk_weights, call)
        return dispatched
    return dispatch_linked(x, topk_idx, topk_weights, call)


def combine(
    runtime: Runtime,
    y: torch.Tensor,
    handle: Handle,
    *,
    weights: torch.Tensor | None = None,
    grad_fp8: str | None = None,
) -> torch.Tensor:
    """`Runtime.combine` with gradients for `y` and `weights`.

    Args:
        y: [num_rows, hidden] FP32 or BF16.
        handle: of `dispatch` of this module.
        weights: FP32 [num_rows], usually the dispatch's `row_weights`; None: applied by the caller, or not at all.
        grad_fp8: "fp32" or "pow2": backward's gradient rows travel as E4M3 with such 1x128 scales.

    Returns:
        [num_tokens, hidden] in the dtype of `y`.

    Raises:
        Like `Runtime.combine`, in forward and in backward.
    """
    if torch.compiler.is_compiling():
        from commlib.graph_breaks import combine_eagerly

        out: torch.Tensor = combine_eagerly(runtime, y, handle, weights, grad_fp8)
        return out
    return combine_linked(runtime, y, handle, weights, grad_fp8)


def save_communication(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """A policy of selective activation checkpointing that recomputes everything but what commlib has moved:

    >>> checkpoint(
    ...     layer, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, save_communication)
    ... )  # doctest: +SKIP
    """
    is_ours = op in (torch.ops.commlib.dispatch.default, torch.ops.commlib.combine.default)
    return CheckpointPolicy.MUST_SAVE if is_ours else CheckpointPolicy.PREFER_RECOMPUTE


def dispatch_linked(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor | None, call: DispatchOptions
) -> Dispatched:
    """`dispatch`, never traced by a compiler."""
    runtime = call.runtime
    _check_tensors(runtime, x=x, topk_idx=topk_idx)
    _check_tensors(runtime, are_optional=True, topk_weights=topk_weights)
    _check_integers(runtime, expert_alignment=call.expert_alignment, capacity=call.capacity)
    if not isinstance(call.fp8, str | None):
        runtime.refuse(f'fp8={call.fp8!r} is not None, "fp32" or "pow2"')
    anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
    rows, weights, received_idx, ticket, link = _Dispatch.apply(anchor, x, topk_weights, topk_idx, call)  # type: ignore[no-untyped-call]
    handle = _handle_of(ticket)
    is_grouped = handle.layout is Layout.GROUPED
    return Dispatched(
        x=rows,
        scales=None,
        row_weights=weights if is_grouped else None,
        topk_idx=None if is_grouped else received_idx,
        topk_weights=None if is_grouped else weights,
        num_tokens_per_expert=handle.num_tokens_per_expert,
        handle=LinkedHandle(handle, ticket, link, call.keep_fp8),
    )


def combine_linked(
    runtime: Runtime, y: torch.Tensor, handle: Handle, weights: torch.Tensor | None, grad_fp8: str | None
) -> torch.Tensor:
    """`combine`, never traced by a compiler."""
    if not isinstance(handle, LinkedHandle):
        runtime.refuse(f"ops.combine needs the handle of ops.dispatch, not a {type(handle).__name__}")
    _check_tensors(runtime, y=y)
    _check_tensors(runtime, are_optional=True, weights=weights)
    out: torch.Tensor = _Combine.apply(handle._link, y, weights, handle._ticket, (runtime, grad_fp8, handle._keeps_fp8))  # type: ignore[no-untyped-call]
    return out


# ---- what torch's schema has no room for: torch would raise on this rank alone, the Runtime tells all of them


def _check_tensors(runtime: Runtime, *, are_optional: bool = False, **values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, torch.Tensor) and not (are_optional and value is None):
            runtime.refuse(f"{name} is a {type(value).__name__}, not a torch tensor")


def _check_integers(runtime: Runtime, **values: Any) -> None:
    for name, value in values.items():
        if value is not None and not (type(value) is int and -(2**63) <= value < 2**63):
            runtime.refuse(f"{name}={value!r} is not an integer of 64 bits")


# ---- what torch's dispatcher sees: policies of selective checkpointing name it


class DispatchOptions(NamedTuple):
    """Arguments of `dispatch` that are no tensors."""

    runtime: Runtime
    layout: str
    expert_alignment: int | None
    fp8: str | None
    keep_fp8: bool
    capacity: int | None


class _TicketMemory(np.ndarray[Any, Any]):
    """The memory of a ticket; its handle lives as long as any tensor of this memory."""

    handle: Handle


# Address of a ticket's memory -> that memory. Operators take and return tensors only: a ticket stands for a handle.
_tickets: weakref.WeakValueDictionary[int, _TicketMemory] = weakref.WeakValueDictionary()
_runtimes: weakref.WeakValueDictionary[int, Runtime] = weakref.WeakValueDictionary()


def _ticket_of(handle: Handle) -> torch.Tensor:
    memory = np.zeros(1, dtype=np.int64).view(_TicketMemory)
    memory.handle = handle
    _tickets[memory.ctypes.data] = memory
    return torch.from_numpy(memory)


def _handle_of(ticket: torch.Tensor) -> Handle:
    return _tickets[ticket.untyped_storage().data_ptr()].handle


def _dispatch_op(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None,
    scales: torch.Tensor | None,
    runtime: int,
    layout: str,
    expert_alignment: int | None,
    fp8: str | None,
    capacity: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    result = _runtimes[runtime].dispatch(
        x,
        topk_idx,
        topk_weights,
        scales=scales,
        layout=layout,
        expert_alignment=expert_alignment,
        fp8=fp8,
        capacity=capacity,
    )
    is_grouped = result.handle.layout is Layout.GROUPED
    return (
        result.x,
        x.new_empty(0, dtype=torch.float32) if result.scales is None else result.scales,
        result.row_weights if is_grouped else result.topk_weights,
        topk_idx.new_empty(0) if is_grouped else result.topk_idx,
        _ticket_of(result.handle),
    )


def _combine_op(y: torch.Tensor, ticket: torch.Tensor, weights: torch.Tensor | None, runtime: int) -> torch.Tensor:
    out: torch.Tensor = _runtimes[runtime].combine(y, _handle_of(ticket), weights=weights).x
    return out


_library: Any = torch.library.Library("commlib", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "dispatch(Tensor x, Tensor topk_idx, Tensor? topk_weights, Tensor? scales, int runtime, str layout, "
    "int? expert_alignment, str? fp8, int? capacity) -> "
    "(Tensor rows, Tensor scales, Tensor weights, Tensor received_idx, Tensor ticket)"
)
_library.define("combine(Tensor y, Tensor ticket, Tensor? weights, int runtime) -> Tensor")
_library.impl("dispatch", _dispatch_op, "CompositeExplicitAutograd")
_library.impl("combine", _combine_op, "CompositeExplicitAutograd")


# ---- autograd


def arrived_rows(
    rows: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype, *, keep_fp8: bool
) -> torch.Tensor:
    """What a dispatch has delivered, as the tensor of `dtype` that autograd sees."""
    if rows.dtype != torch.float8_e4m3fn or scales is None:
        return rows
    return Fp8Rows(rows, scales, dtype) if keep_fp8 else dequantize(rows, scales, dtype)


def plain(rows: torch.Tensor) -> torch.Tensor:
    """Rows with memory of their own: ranks must not differ in what they hand to an operation."""
    return rows.dequantize() if isinstance(rows, Fp8Rows) else rows


def payload_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows and scales as a dispatch takes them."""
    return (x.fp8, x.scales) if isinstance(x, Fp8Rows) else (x, None)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        topk_idx: torch.Tensor,
        call: DispatchOptions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        runtime, layout, expert_alignment, fp8, keep_fp8, capacity = call
        _runtimes[runtime._id] = runtime
        values, x_scales = payload_of(x)
        rows, scales, weights, received_idx, ticket = torch.ops.commlib.dispatch(
            values, topk_idx, topk_weights, x_scales, runtime._id, layout, expert_alignment, fp8, capacity
        )
        ctx.runtime, ctx.handle, ctx.has_weights = runtime, _handle_of(ticket), topk_weights is not None
        ctx.mark_non_differentiable(received_idx, ticket)
        arrived = arrived_rows(rows, scales, x.dtype, keep_fp8=keep_fp8)
        return arrived, weights, received_idx, ticket, anchor.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad_rows: torch.Tensor, grad_weights: torch.Tensor, *others: torch.Tensor) -> Any:
        # Asked for on all ranks alike, whether this rank needs the gradient or not.
        weight_grads = grad_weights if ctx.has_weights else None
        combined = ctx.runtime.combine(plain(grad_rows), ctx.handle, weight_grads=weight_grads)
        return None, combined.x, combined.weight_grads, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        link: torch.Tensor,
        y: torch.Tensor,
        weights: torch.Tensor | None,
        ticket: torch.Tensor,
        call: tuple[Runtime, str | None, bool],
    ) -> torch.Tensor:
        ctx.runtime, ctx.grad_fp8, ctx.keeps_fp8 = call
        ctx.handle = _handle_of(ticket)
        # y is only needed for the gradient of the weights.
        ctx.has_weights = weights is not None
        if weights is not None:
            ctx.save_for_backward(y, weights)
        out: torch.Tensor = torch.ops.commlib.combine(y, ticket, weights, ctx.runtime._id)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Any:
        result = ctx.runtime.dispatch(plain(grad_out), handle=ctx.handle, fp8=ctx.grad_fp8)
        keep_fp8 = ctx.keeps_fp8 and not ctx.has_weights
        grad_rows = arrived_rows(result.x, result.scales, grad_out.dtype, keep_fp8=keep_fp8)
        grad_link = torch.zeros(())
        if not ctx.has_weights:
            return grad_link, grad_rows, None, None, None
        y, weights = ctx.saved_tensors
        grad_weights = (y.float() * grad_rows.float()).sum(dim=-1)
        grad_y = (grad_rows.float() * weights[:, None]).to(y.dtype)
        return grad_link, grad_y, grad_weights, None, None
