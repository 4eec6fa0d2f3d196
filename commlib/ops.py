"""Dispatch and combine as torch autograd operations.

The backward of a dispatch is a combine, the backward of a combine is a dispatch by the same handle. Both are
collective, so they run on every rank whatever its inputs are: no tokens, no rows, frozen tensors. `combine` is tied to
its dispatch for that reason, and its result has to take part in the loss on every rank.
"""

from __future__ import annotations

from typing import Any

import torch

from commlib.errors import ConfigError
from commlib.handle import Dispatched, Handle
from commlib.layout import Layout
from commlib.quant import dequantize
from commlib.runtime import Runtime

__all__ = ["LinkedHandle", "combine", "dispatch"]


class LinkedHandle(Handle):
    """A handle whose combine's backward leads to the backward of its dispatch, even if no row connects the two."""

    def __init__(self, handle: Handle, link: torch.Tensor) -> None:
        super().__init__(handle._native, handle.layout, handle._runtime_id)
        # The graph behind `link` holds a plain Handle, never this object: no reference cycle, nothing leaks.
        self._link = link


def dispatch(
    runtime: Runtime,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor | None = None,
    *,
    layout: Layout | str = Layout.GROUPED,
    expert_alignment: int | None = None,
    fp8: str | None = None,
    capacity: int | None = None,
) -> Dispatched:
    """`Runtime.dispatch` with gradients for `x` and `topk_weights`.

    Args:
        x: [num_tokens, hidden] FP32 or BF16.
        topk_idx, topk_weights, layout, expert_alignment, capacity: see `Runtime.dispatch`.
        fp8: rows travel as E4M3 with 1x128 scales and are dequantised on arrival; the gradient passes straight through.

    Returns:
        Dispatched, its `x` in the dtype of the input (`scales` is None), its handle for `combine` of this module. The
        gradient of `row_weights` (grouped) or `topk_weights` (rows) reaches `topk_weights` of the sender.

    Raises:
        Like `Runtime.dispatch`, in forward and in backward.
    """
    holder: list[Dispatched] = []
    anchor = torch.zeros((), requires_grad=torch.is_grad_enabled())
    rows, weights, link = _Dispatch.apply(  # type: ignore[no-untyped-call]
        anchor, x, topk_weights, topk_idx, (runtime, layout, expert_alignment, fp8, capacity), holder
    )
    plain = holder[0]
    is_grouped = plain.handle.layout is Layout.GROUPED
    return plain._replace(
        x=rows,
        scales=None,
        row_weights=weights if is_grouped else None,
        topk_weights=None if is_grouped else weights,
        handle=LinkedHandle(plain.handle, link),
    )


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
    if not isinstance(handle, LinkedHandle):
        raise ConfigError(f"ops.combine needs the handle of ops.dispatch, not a {type(handle).__name__}")
    plain = Handle(handle._native, handle.layout, handle._runtime_id)
    out: torch.Tensor = _Combine.apply(handle._link, y, weights, (runtime, plain, grad_fp8))  # type: ignore[no-untyped-call]
    return out


def _dequantized(dispatched: Dispatched, dtype: torch.dtype) -> torch.Tensor:
    if dispatched.scales is None:
        rows: torch.Tensor = dispatched.x
        return rows
    return dequantize(dispatched.x, dispatched.scales, dtype)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        topk_idx: torch.Tensor,
        call: tuple[Runtime, Layout | str, int | None, str | None, int | None],
        holder: list[Dispatched],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        runtime, layout, expert_alignment, fp8, capacity = call
        result = runtime.dispatch(
            x,
            topk_idx,
            topk_weights,
            layout=layout,
            expert_alignment=expert_alignment,
            fp8=fp8,
            capacity=capacity,
        )
        holder.append(result)
        ctx.runtime, ctx.handle, ctx.has_weights = runtime, result.handle, topk_weights is not None
        is_grouped = result.handle.layout is Layout.GROUPED
        weights = result.row_weights if is_grouped else result.topk_weights
        return _dequantized(result, x.dtype), weights, anchor.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad_rows: torch.Tensor, grad_weights: torch.Tensor, grad_link: torch.Tensor) -> Any:
        # Asked for on all ranks alike, whether this rank needs the gradient or not.
        weight_grads = grad_weights if ctx.has_weights else None
        combined = ctx.runtime.combine(grad_rows, ctx.handle, weight_grads=weight_grads)
        return None, combined.x, combined.weight_grads, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        link: torch.Tensor,
        y: torch.Tensor,
        weights: torch.Tensor | None,
        call: tuple[Runtime, Handle, str | None],
    ) -> torch.Tensor:
        runtime, handle, grad_fp8 = call
        ctx.runtime, ctx.handle, ctx.grad_fp8 = runtime, handle, grad_fp8
        # y is only needed for the gradient of the weights.
        ctx.has_weights = weights is not None
        if weights is not None:
            ctx.save_for_backward(y, weights)
        out: torch.Tensor = runtime.combine(y, handle, weights=weights).x
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> Any:
        result = ctx.runtime.dispatch(grad_out, handle=ctx.handle, fp8=ctx.grad_fp8)
        grad_rows = _dequantized(result, grad_out.dtype)
        grad_link = torch.zeros(())
        if not ctx.has_weights:
            return grad_link, grad_rows, None, None
        y, weights = ctx.saved_tensors
        grad_weights = (y.float() * grad_rows.float()).sum(dim=-1)
        grad_y = (grad_rows.float() * weights[:, None]).to(y.dtype)
        return grad_link, grad_y, grad_weights, None
