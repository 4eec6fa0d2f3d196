"""One step's forward and backward passes: micro-batches one after the other, or laid side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from commlib import overlap
from examples.train_moe.config import TrainConfig
from examples.train_moe.model import Losses, Transformer, losses_of


def add_gradients(
    model: Transformer, batches: Sequence[Tensor], config: TrainConfig, *, scale: float, way: str
) -> list[Losses]:
    """Adds the gradients of `scale * total` of every micro-batch to the parameters'.

    Args:
        model: the model.
        batches: windows of each micro-batch, int64 [sequences, seq_len + 2].
        config: of the losses.
        scale: factor of every loss.
        way: see `ParallelConfig.overlap`. The gradients are the same, bit for bit.

    Returns:
        The losses of each micro-batch, without a graph.
    """
    steps = _Steps(model, batches, config, scale)
    {"none": steps.one_by_one, "batches": steps.two_at_a_time, "pairs": steps.in_pairs}[way]()
    return [Losses(*(value.detach() for value in losses)) for losses in steps.losses]


class _Steps:
    def __init__(self, model: Transformer, batches: Sequence[Tensor], config: TrainConfig, scale: float) -> None:
        self._model, self._batches, self._config, self._scale = model, batches, config, scale
        self._layers = model.layers()
        self.losses: list[Losses] = []

    def one_by_one(self) -> None:
        for windows in self._batches:
            losses = losses_of(self._model(windows[:, :-1]), windows, self._config)
            torch.autograd.backward(losses.total * self._scale)
            self.losses.append(losses)

    def two_at_a_time(self) -> None:
        count = len(self._layers)
        for first in range(0, len(self._batches), 2):
            flows = {0: self._flow(first), 1: self._flow(first + 1)}
            overlap.run(overlap.two_batches_forward(count), flows)
            for batch, flow in flows.items():
                self._turn(flow, first + batch)
            overlap.run(overlap.two_batches_backward(count), flows)

    def in_pairs(self) -> None:
        count = len(self._layers)
        behind = self._flow(0)
        overlap.run(overlap.forward(count), {0: behind})
        self._turn(behind, 0)
        for batch in range(1, len(self._batches)):
            ahead = self._flow(batch)
            overlap.run(overlap.forward_backward(count, count), {0: ahead, 1: behind})
            self._turn(ahead, batch)
            behind = ahead
        overlap.run(overlap.backward(count), {0: behind})

    def _flow(self, batch: int) -> overlap.Flow:
        return overlap.Flow(self._layers, (self._batches[batch][:, :-1],))

    def _turn(self, flow: overlap.Flow, batch: int) -> None:
        """From the end of a forward pass to the start of the backward pass: head and losses."""
        outputs = [output.requires_grad_() for output in flow.take_outputs()]
        losses = losses_of(self._model.predict(*outputs), self._batches[batch], self._config)
        torch.autograd.backward(losses.total * self._scale)
        flow.set_output_grads([output.grad for output in outputs])
        self.losses.append(losses)
