"""SwiGLU experts in FP8 that keep nothing for the backward pass but FP8.

DeepSeek-V3 technical report (arXiv 2412.19437), sections 3.3.1 and 3.3.3. All three products of a linear layer
(forward, gradient of the input, gradient of the weight) take FP8; the rows that dispatch delivers are kept as they
came, the inputs of SwiGLU are kept in FP8 and its output is computed again.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from commlib.errors import ConfigError
from commlib.experts.casts import casts_for
from commlib.experts.grouped_gemm import grouped_mm, grouped_weight_grad
from commlib.experts.weight_casts import cast_weight, is_keeping
from commlib.layout import SCALE_BLOCK
from commlib.overlap.anchor import ANCHOR
from commlib.overlap.weight_grads import WeightGradStore, store_for
from commlib.quant import Fp8Rows

__all__ = ["SwiGLUWeights", "fp8_swiglu", "swiglu_linked"]


class SwiGLUWeights(NamedTuple):
    """`gate` and `up` [E, W, H], `down` [E, H, W], of any floating dtype: the master copies."""

    gate: Tensor
    up: Tensor
    down: Tensor


def fp8_swiglu(x: Tensor, row_weights: Tensor, weights: SwiGLUWeights, ends: Tensor) -> Tensor:
    """`y[r] = down_e(w[r] * silu(gate_e(x[r])) * up_e(x[r]))` for the rows r of each expert e.

    Differentiable in `x`, `row_weights` and all weights. Kept for the backward pass: `x` as it is, gate's and up's
    outputs as E4M3 with 1x128 scales, `row_weights`. Inside `overlap.WeightGradStore.recording` the gradients of
    weights wait, their operands in FP8.

    Args:
        x: [T, H], `quant.Fp8Rows` (of `ops.dispatch` with `keep_fp8`); rows of another kind are cast. T and the rows of
            each expert are multiples of 128: `expert_alignment=128`.
        row_weights: FP32 [T].
        weights: H and W are multiples of 128. They are cast in 128x128 tiles in every forward and backward pass, or
            once in `keep_weight_casts`.
        ends: int32 [E], where each expert's rows stop.

    Returns:
        [T, H] in the dtype of `x`.

    Raises:
        ConfigError: H, W or T is no multiple of 128.
    """
    if len(x) % SCALE_BLOCK:
        raise ConfigError(f"num_rows={len(x)} is no multiple of {SCALE_BLOCK}")
    if torch.compiler.is_compiling() and is_keeping():
        from commlib.experts.graph_breaks import swiglu_eagerly

        done: Tensor = swiglu_eagerly(x, row_weights, weights, ends)
        return done
    return swiglu_linked(x, row_weights, weights, ends)


def swiglu_linked(x: Tensor, row_weights: Tensor, weights: SwiGLUWeights, ends: Tensor) -> Tensor:
    """`fp8_swiglu` on good arguments, in the graph of autograd."""
    store = store_for(*weights)
    work: dict[int, list[Any]] | None = None
    edges: tuple[Tensor | None, ...] = (None, None, None)
    if store is None:
        edges = weights
        if not torch.compiler.is_compiling():
            work = {}
            edges = tuple(
                _InTurn.apply(weight, work, place)  # type: ignore[no-untyped-call]
                for place, weight in enumerate(weights)
            )
    y: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        ANCHOR, x, row_weights, *edges, weights, ends, store, work
    )
    return y


class _InTurn(torch.autograd.Function):
    """The edge from `_Experts` to a weight. Its gradient is computed when autograd goes along here, so that the one
    before has reached its weight, and only one of them takes memory beside those that are kept. `work`: what is left to
    compute, for each backward pass that is under way."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, work: dict[int, list[Any]], place: int) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.work, ctx.place = work, place
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        left = ctx.work[_backward_pass()]
        compute, left[ctx.place] = left[ctx.place], None
        return compute(), None, None


def _backward_pass() -> int:
    """Its number, the same on all of autograd's threads."""
    return int(torch._C._current_graph_task_id())


class _Experts(torch.autograd.Function):
    """Weights come in a tuple that autograd does not look into, see `overlap.weight_grads`; where they have to be seen,
    also as `gate`, `up` and `down`: themselves, or edges that lead to them."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        row_weights: Tensor,
        gate: Tensor | None,
        up: Tensor | None,
        down: Tensor | None,
        weights: SwiGLUWeights,
        ends: Tensor,
        store: WeightGradStore | None,
        work: dict[int, list[Any]] | None,
    ) -> Tensor:
        rows = _as_rows(x)
        gate_out = grouped_mm(rows, cast_weight(weights.gate), ends)
        up_out = grouped_mm(rows, cast_weight(weights.up), ends)
        inner, gate_kept, up_kept = casts_for(x).swiglu_cast(gate_out, up_out, row_weights)
        ctx.save_for_backward(
            *(rows.fp8, rows.scales, row_weights, ends),
            *(gate_kept.fp8, gate_kept.scales, up_kept.fp8, up_kept.scales),
            *weights,
        )
        ctx.dtype, ctx.store, ctx.work = x.dtype, store, work
        ctx.later = None if store is None else weights
        # Kept casts are found by the weights themselves; checkpoints hand out others, which are the same memory.
        ctx.weights = weights if is_keeping() else None
        return grouped_mm(inner, cast_weight(weights.down), ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, x_scales, row_weights, ends, gate_q, gate_s, up_q, up_s, *saved = ctx.saved_tensors
        dtype, weights = ctx.dtype, ctx.weights or SwiGLUWeights(*saved)
        rows, grad_y = Fp8Rows(x, x_scales, dtype), _as_rows(grad)
        gate_kept, up_kept = Fp8Rows(gate_q, gate_s, dtype), Fp8Rows(up_q, up_s, dtype)

        grad_inner = grouped_mm(grad_y, cast_weight(weights.down, turned=True), ends)
        grad_gate, grad_up, grad_row_weights = casts_for(x).swiglu_backward(grad_inner, gate_kept, up_kept, row_weights)
        grad_x = grouped_mm(grad_gate, cast_weight(weights.gate, turned=True), ends)
        grad_x = grouped_mm(grad_up, cast_weight(weights.up, turned=True), ends, add_to=grad_x)

        work = (
            partial(grouped_weight_grad, grad_gate, rows, ends, weights.gate.dtype),
            partial(grouped_weight_grad, grad_up, rows, ends, weights.up.dtype),
            partial(_down_grad, grad_y, gate_kept, up_kept, row_weights, ends, weights.down.dtype),
        )
        weight_grads: list[Tensor | None] = [None] * len(work)
        left: list[Any] = [None] * len(work)
        if ctx.work is not None:
            # Edges to weights whose gradients this pass does not want are not gone along: what is left goes at its end.
            number = _backward_pass()
            ctx.work[number] = left
            torch.autograd.Variable._execution_engine.queue_callback(partial(ctx.work.pop, number, None))
        for place, compute in enumerate(work):
            if ctx.later is not None:
                if ctx.later[place].requires_grad:
                    ctx.store.put(ctx.later[place], compute)
            elif not ctx.needs_input_grad[3 + place]:
                continue
            elif ctx.work is None:
                weight_grads[place] = compute()
            else:
                left[place] = compute
        return None, grad_x, grad_row_weights, *weight_grads, *[None] * 4


def _down_grad(
    grad_y: Fp8Rows, gate: Fp8Rows, up: Fp8Rows, row_weights: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    """The gradient of `down`, whose input is computed again."""
    inner = casts_for(gate).swiglu_again(gate, up, row_weights)
    return grouped_weight_grad(grad_y, inner, ends, dtype)


def _as_rows(x: Tensor) -> Fp8Rows:
    if isinstance(x, Fp8Rows):
        return x
    rows: Fp8Rows = casts_for(x).cast_rows(x)
    return rows
