"""What an MoE layer has to offer so that its communication can be hidden: three pieces of computation.

Between them lie dispatch and combine, which the schedule places. `run_layer` is the layer without a schedule: the
definition of what overlapped runs have to compute, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from commlib import ops
from commlib.handle import Dispatched
from commlib.layout import Layout
from commlib.runtime import Runtime

__all__ = ["Attended", "Exchange", "Layer", "State", "run_layer"]

# What passes from layer to layer: the residual stream, and whatever else a model carries along.
State = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """How a layer's rows travel.

    Attributes:
        runtime: of the ranks that share the experts.
        layout, expert_alignment, fp8, capacity: of the dispatch, see `Runtime.dispatch`.
        keep_fp8: rows and gradient rows that travel as FP8 stay `quant.Fp8Rows`, see `ops.dispatch`.
        grad_fp8: of the gradients that combine's backward dispatches, see `ops.combine`.
    """

    runtime: Runtime
    layout: Layout = Layout.GROUPED
    expert_alignment: int | None = None
    fp8: str | None = None
    grad_fp8: str | None = None
    keep_fp8: bool = False
    capacity: int | None = None


class Attended(NamedTuple):
    """What the first piece hands on.

    Attributes:
        x: [tokens, hidden], the rows for the routed experts.
        topk_idx: int64 [tokens, topk].
        topk_weights: FP32 [tokens, topk].
        kept: what stays on this rank for `finish`: the residual stream, the shared experts' output, ...
    """

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor
    kept: State


class Layer(Protocol):
    """An MoE layer in pieces, each an ordinary differentiable function.

    Every rank has to run every layer in the same order, also without tokens. Linear layers that use
    `overlap.linear` and `overlap.grouped_linear` take part in the split into input and weight gradients; all other
    parameters get their gradients in step B.
    """

    @property
    def exchange(self) -> Exchange:
        """How its rows travel."""

    def attention(self, *state: Tensor) -> Attended:
        """From the layer's input to the gate's choice."""

    def mlp(self, received: Dispatched) -> Tensor:
        """The routed experts with the routing weights applied: [rows, hidden] in the order of `received.x`."""

    def finish(self, kept: State, combined: Tensor) -> State:
        """The layer's output from what was kept and combined's sums [tokens, hidden]."""


def run_layer(layer: Layer, *state: Tensor) -> State:
    """The layer as one differentiable function, with nothing overlapped."""
    how, attended = layer.exchange, layer.attention(*state)
    received = ops.dispatch(
        how.runtime,
        attended.x,
        attended.topk_idx,
        attended.topk_weights,
        layout=how.layout,
        expert_alignment=how.expert_alignment,
        fp8=how.fp8,
        keep_fp8=how.keep_fp8,
        capacity=how.capacity,
    )
    combined = ops.combine(how.runtime, layer.mlp(received), received.handle, grad_fp8=how.grad_fp8)
    return layer.finish(attended.kept, combined)
