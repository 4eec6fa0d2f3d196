"""Runs whose results are compared send tokens to the same experts.

A rounding before a gate changes some of its choices, and with them whole rows of gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle

from torch import Tensor

from commlib import routing
from examples.moe_layer import MoELayer

Gate = Callable[[Tensor, routing.GateConfig, Tensor], routing.GateOutput]


class Choices:
    """Which experts tokens took in the gates of some layers, call by call."""

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self._layers = layers
        self._noted: list[list[Tensor]] = [[] for _ in layers]

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside gates choose by themselves, and it is noted what."""

        def note(noted: list[Tensor], logits: Tensor, config: routing.GateConfig, bias: Tensor) -> routing.GateOutput:
            chosen = routing.gate(logits, config, bias)
            noted.append(chosen.topk_idx)
            return chosen

        with self._replaced([partial(note, noted) for noted in self._noted]):
            yield

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Inside each call of a gate chooses what was noted, in order, after the last call what the first one did.

        Gates compute all that they always do: a comparison of times has to see it. Weights, and through them gradients,
        come from the scores of now.
        """

        def repeat(
            noted: Iterator[Tensor], logits: Tensor, config: routing.GateConfig, bias: Tensor
        ) -> routing.GateOutput:
            scores, topk_idx = routing.gate(logits, config, bias).scores, next(noted)
            return routing.GateOutput(topk_idx, routing.weigh_experts(scores, topk_idx, config), scores)

        with self._replaced([partial(repeat, cycle(noted)) for noted in self._noted]):
            yield

    @contextmanager
    def _replaced(self, gates: list[Gate]) -> Iterator[None]:
        before = [layer.choose for layer in self._layers]
        for layer, each in zip(self._layers, gates, strict=True):
            layer.choose = each
        try:
            yield
        finally:
            for layer, each in zip(self._layers, before, strict=True):
                layer.choose = each
