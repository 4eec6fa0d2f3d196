"""A piece of the autograd graph cut out of its surroundings, so that it is differentiated when the schedule says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from commlib.overlap.anchor import ANCHOR

__all__ = ["Segment"]


class Segment:
    """One call of a differentiable function on inputs that are cut off from where they come from.

    Keeps the graph, but none of its ends: memory of inputs and outputs lives as long as the function's own operations
    want it for the backward pass.

    Args:
        inputs: of the function.
        call: the function; returns tensors.
        is_needed: whether gradients of the inputs are wanted; of floating ones only.
    """

    def __init__(
        self, inputs: Sequence[Tensor], call: Callable[..., Sequence[Tensor]], is_needed: Sequence[bool] | None = None
    ) -> None:
        self._input_grads: list[Tensor | None] = [None] * len(inputs)
        self._num_inputs = len(inputs)
        sources = [each.detach() for each in inputs]
        wanted = [
            place
            for place, each in enumerate(inputs)
            if each.is_floating_point() and (is_needed is None or is_needed[place])
        ]
        if wanted and torch.is_grad_enabled():
            cut = _Source.apply(ANCHOR, (self._input_grads, wanted), *(sources[place] for place in wanted))  # type: ignore[no-untyped-call]
            for place, source in zip(wanted, cut, strict=True):
                sources[place] = source
        outputs = call(*sources)
        self.outputs: tuple[Tensor, ...] = tuple(output.detach() for output in outputs)
        self._edges = [get_gradient_edge(output) if output.requires_grad else None for output in outputs]

    def take_outputs(self) -> tuple[Tensor, ...]:
        """What the function returned, cut off from where it goes to; once."""
        outputs, self.outputs = self.outputs, ()
        return outputs

    @property
    def needs_grad(self) -> tuple[bool, ...]:
        """Of each output: whether its gradient would reach anything."""
        return tuple(edge is not None for edge in self._edges)

    def backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Adds to the gradients of parameters; returns those of the inputs, None where there is none. Works once."""
        roots: list[GradientEdge] = []
        wanted: list[Tensor] = []
        for edge, grad in zip(self._edges, grads, strict=True):
            if edge is not None and grad is not None:
                roots.append(edge)
                wanted.append(grad)
        self._edges = []
        if roots:
            torch.autograd.backward(roots, wanted)
        return self._input_grads


class _Source(torch.autograd.Function):
    """Where a segment begins: its outputs are the inputs, their gradients end here."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, sink: tuple[list[Tensor | None], list[int]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sink = sink
        ctx.set_materialize_grads(False)
        return tuple(each.view_as(each) for each in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        input_grads, places = ctx.sink
        for place, grad in zip(places, grads, strict=True):
            input_grads[place] = grad
        return None, None, *(None for _ in grads)
