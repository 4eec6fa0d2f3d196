"""One micro-batch on its way through the layers of a stage, one step of a schedule at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from commlib.handle import Dispatched, Handle
from commlib.layout import Layout
from commlib.ops import arrived_rows, payload_of, plain
from commlib.overlap.layer import Layer, State
from commlib.overlap.schedule import Direction, Half, Phase, Schedule, Step
from commlib.overlap.segment import Segment
from commlib.overlap.weight_grads import WeightGradStore, WeightWork

__all__ = ["Flow", "run"]

Grads = Sequence[Tensor | None]


@dataclass
class _Passage:
    """One micro-batch in one layer, from its forward to its backward pass; what is not needed any more is gone."""

    layer: Layer
    attention: Segment | None = None
    mlp: Segment | None = None
    finish: Segment | None = None
    pending: Any = None  # the communication under way
    topk_idx: Tensor | None = None
    kept: State = ()
    received: Dispatched | None = None
    handle: Handle | None = None
    dtype: Any = None  # of the rows before they travelled
    combined: Tensor | None = None  # stands for shape and dtype only
    rows: tuple[Tensor, ...] = ()  # of the rows and their weights, the same
    grads: Grads = ()  # for the next step back
    kept_grads: Grads = ()
    weight_work: dict[Phase, WeightWork] = field(default_factory=dict)


class Flow:
    """The forward and, later, the backward pass of one micro-batch.

    Steps have to come in an order in which every step finds its data; the schedules of this package see to that.
    Gradients of parameters are added to their `grad`, as `Tensor.backward` does.

    Args:
        layers: of the stage, in order.
        inputs: of the first layer; those that require gradients get them (`take_input_grads`).

    Attributes:
        is_differentiated: the backward pass has begun.
    """

    def __init__(self, layers: Sequence[Layer], inputs: State) -> None:
        self._passages = [_Passage(layer) for layer in layers]
        self._state = tuple(each.detach() for each in inputs)
        self._is_input_needed = tuple(each.requires_grad for each in inputs)
        self._grads: Grads = ()
        self._store = WeightGradStore()
        self.is_differentiated = False

    @property
    def num_layers(self) -> int:
        return len(self._passages)

    def take_outputs(self) -> State:
        """Of the last layer, after the forward steps, cut off from the graph; once."""
        outputs, self._state = self._state, ()
        return outputs

    @property
    def output_needs_grad(self) -> tuple[bool, ...]:
        """Of each output: whether its gradient would reach anything. Between the forward and the backward steps."""
        finish = self._passages[-1].finish
        assert finish is not None, "the forward steps are not done"
        return finish.needs_grad

    def set_output_grads(self, grads: Grads) -> None:
        """Before the first backward step; None for outputs that got none."""
        self._grads = tuple(grads)
        self.is_differentiated = True

    def take_input_grads(self) -> Grads:
        """After the backward steps; None for inputs that got none; once."""
        grads, self._grads = self._grads, ()
        return grads

    def take_weight_work(self) -> WeightWork:
        """Gradients of weights that the schedule left out, in the order in which they have to be added."""
        work: WeightWork = ()
        for passage in reversed(self._passages):
            for phase in (Phase.MLP, Phase.ATTENTION):
                work += passage.weight_work.pop(phase, ())
        return work

    def take(self, step: Step) -> None:
        """Makes one step."""
        passage = self._passages[step.task.layer]
        trace = passage.layer.exchange.runtime.trace
        with nullcontext() if trace is None else trace.labelled(" ".join(str(step).split())):
            self._take(step, passage)

    def _take(self, step: Step, passage: _Passage) -> None:
        task = step.task
        if task.direction is Direction.W:
            for work in passage.weight_work.pop(task.phase):
                work()
            return
        with self._store.recording():
            _ACTIONS[task.phase, task.direction, step.half](self, passage)

    # ---- forward

    def _attention(self, passage: _Passage) -> None:
        def call(*state: Tensor) -> State:
            attended = passage.layer.attention(*state)
            passage.topk_idx = attended.topk_idx
            return (attended.x, attended.topk_weights, *attended.kept)

        is_first = passage is self._passages[0]
        passage.attention = Segment(self._state, call, self._is_input_needed if is_first else None)
        self._state = ()

    def _dispatch_send(self, passage: _Passage) -> None:
        assert passage.attention is not None
        how, (x, topk_weights, *kept) = passage.layer.exchange, passage.attention.take_outputs()
        passage.kept, passage.dtype = tuple(kept), x.dtype
        values, scales = payload_of(x)
        passage.pending = how.runtime.dispatch_send(
            values,
            passage.topk_idx,
            topk_weights,
            scales=scales,
            layout=how.layout,
            expert_alignment=how.expert_alignment,
            fp8=how.fp8,
            capacity=how.capacity,
        )
        passage.topk_idx = None

    def _dispatch_recv(self, passage: _Passage) -> None:
        passage.received = passage.layer.exchange.runtime.dispatch_recv(_taken(passage))
        passage.handle = passage.received.handle

    def _mlp(self, passage: _Passage) -> None:
        received, passage.received = passage.received, None
        assert received is not None
        is_grouped = received.handle.layout is Layout.GROUPED

        def call(rows: Tensor, weights: Tensor) -> State:
            if is_grouped:
                return (passage.layer.mlp(received._replace(x=rows, scales=None, row_weights=weights)),)
            return (passage.layer.mlp(received._replace(x=rows, scales=None, topk_weights=weights)),)

        keep_fp8 = passage.layer.exchange.keep_fp8
        rows = arrived_rows(received.x, received.scales, passage.dtype, keep_fp8=keep_fp8)
        weights = received.row_weights if is_grouped else received.topk_weights
        passage.rows = (_like(rows), _like(weights))
        passage.mlp = Segment((rows, weights), call)

    def _combine_send(self, passage: _Passage) -> None:
        assert passage.mlp is not None and passage.handle is not None
        (y,) = passage.mlp.take_outputs()
        passage.pending = passage.layer.exchange.runtime.combine_send(y, passage.handle)

    def _combine_recv(self, passage: _Passage) -> None:
        combined = passage.layer.exchange.runtime.combine_recv(_taken(passage)).x
        kept, passage.kept, passage.combined = passage.kept, (), _like(combined)
        passage.finish = Segment((combined, *kept), lambda sums, *kept: passage.layer.finish(kept, sums))
        self._state = passage.finish.take_outputs()

    # ---- backward

    def _combine_back_send(self, passage: _Passage) -> None:
        assert passage.finish is not None and passage.combined is not None
        grads = self._backward(passage, Phase.MLP, passage.finish, self._grads)
        passage.finish, self._grads = None, ()
        grad, *passage.kept_grads = grads
        how = passage.layer.exchange
        passage.pending = how.runtime.dispatch_send(
            plain(_or_zeros(grad, passage.combined)), handle=passage.handle, fp8=how.grad_fp8
        )

    def _combine_back_recv(self, passage: _Passage) -> None:
        how = passage.layer.exchange
        result = how.runtime.dispatch_recv(_taken(passage))
        assert passage.combined is not None
        dtype = passage.combined.dtype
        passage.grads = (arrived_rows(result.x, result.scales, dtype, keep_fp8=how.keep_fp8),)

    def _mlp_back(self, passage: _Passage) -> None:
        assert passage.mlp is not None
        passage.grads = self._backward(passage, Phase.MLP, passage.mlp, passage.grads)
        passage.mlp = None

    def _dispatch_back_send(self, passage: _Passage) -> None:
        assert passage.handle is not None
        grad_rows, grad_weights = (_or_zeros(*each) for each in zip(passage.grads, passage.rows, strict=True))
        passage.grads = ()
        passage.pending = passage.layer.exchange.runtime.combine_send(
            plain(grad_rows), passage.handle, weight_grads=grad_weights
        )

    def _dispatch_back_recv(self, passage: _Passage) -> None:
        result = passage.layer.exchange.runtime.combine_recv(_taken(passage))
        passage.grads = (result.x, result.weight_grads)
        passage.handle = None

    def _attention_back(self, passage: _Passage) -> None:
        assert passage.attention is not None
        grads = (*passage.grads, *passage.kept_grads)
        self._grads = self._backward(passage, Phase.ATTENTION, passage.attention, grads)
        passage.attention, passage.grads, passage.kept_grads = None, (), ()

    def _backward(self, passage: _Passage, phase: Phase, segment: Segment, grads: Grads) -> Grads:
        """Gradients of the segment's inputs; those of its weights become the work of step W of `phase`."""
        input_grads = segment.backward(grads)
        passage.weight_work[phase] = passage.weight_work.get(phase, ()) + self._store.take()
        return input_grads


def _taken(passage: _Passage) -> Any:
    pending, passage.pending = passage.pending, None
    return pending


def _like(tensor: Tensor) -> Tensor:
    """Shape, dtype and device of `tensor` without its memory."""
    return torch.empty(1, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    """All ranks communicate, also one on which nothing has a gradient."""
    return like.new_zeros(like.shape) if grad is None else grad


_ACTIONS: dict[tuple[Phase, Direction, Half], Callable[[Flow, _Passage], None]] = {
    (Phase.ATTENTION, Direction.F, Half.WHOLE): Flow._attention,
    (Phase.DISPATCH, Direction.F, Half.SEND): Flow._dispatch_send,
    (Phase.DISPATCH, Direction.F, Half.RECV): Flow._dispatch_recv,
    (Phase.MLP, Direction.F, Half.WHOLE): Flow._mlp,
    (Phase.COMBINE, Direction.F, Half.SEND): Flow._combine_send,
    (Phase.COMBINE, Direction.F, Half.RECV): Flow._combine_recv,
    (Phase.COMBINE, Direction.B, Half.SEND): Flow._combine_back_send,
    (Phase.COMBINE, Direction.B, Half.RECV): Flow._combine_back_recv,
    (Phase.MLP, Direction.B, Half.WHOLE): Flow._mlp_back,
    (Phase.DISPATCH, Direction.B, Half.SEND): Flow._dispatch_back_send,
    (Phase.DISPATCH, Direction.B, Half.RECV): Flow._dispatch_back_recv,
    (Phase.ATTENTION, Direction.B, Half.WHOLE): Flow._attention_back,
}


def run(schedule: Schedule, flows: Mapping[int, Flow]) -> None:
    """Makes the steps of a schedule; `flows` has a micro-batch for each name in it."""
    for step in schedule:
        flows[step.task.batch].take(step)
