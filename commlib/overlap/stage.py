"""Layers of one pipeline stage as a module, whose forward and backward passes a pipeline may lay side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from commlib.errors import ConfigError
from commlib.overlap.anchor import ANCHOR
from commlib.overlap.flow import Flow, Grads, run
from commlib.overlap.layer import Layer, run_layer
from commlib.overlap.schedule import backward, forward
from commlib.overlap.weight_grads import WeightWork

__all__ = ["Stage", "flow_behind"]


class Stage(nn.Module):
    """MoE layers one after the other: `state -> state`, a tensor if the state has only one.

    Called like any module, it computes the same as its layers, forward and backward, as one node of the autograd graph;
    rows still move while gradients of weights are computed. `torch.distributed.pipelining` takes it as the module of a
    stage (with `input_args` and `output_args`, because shapes cannot be found out without communication).

    Args:
        layers: `Layer`s that are modules.
        defers_weights: leave the gradients of weights until what `build_weight_step` returns is called; for the
            `dw_builder` of torch's `PipelineStage`.
    """

    def __init__(self, layers: Sequence[nn.Module], *, defers_weights: bool = False) -> None:
        super().__init__()
        self.modules_in_order = nn.ModuleList(layers)
        self._defers_weights = defers_weights
        self._weight_work: WeightWork = ()
        self._flow_ahead: Flow | None = None

    @property
    def layers(self) -> list[Layer]:
        return [cast(Layer, module) for module in self.modules_in_order]

    def forward(self, *state: Tensor) -> Tensor | tuple[Tensor, ...]:
        """state -> state."""
        if not torch.is_grad_enabled():
            for layer in self.layers:
                state = run_layer(layer, *state)
            return state if len(state) > 1 else state[0]
        flow, self._flow_ahead = self._flow_ahead, None
        if flow is None:
            flow = Flow(self.layers, state)
            run(forward(flow.num_layers), {0: flow})
        outputs: tuple[Tensor, ...] = _StageNode.apply(ANCHOR, (self, flow), *state)  # type: ignore[no-untyped-call]
        return outputs if len(outputs) > 1 else outputs[0]

    def expect(self, flow: Flow) -> None:
        """The next call of the module is for `flow`, whose forward steps are done already."""
        self._flow_ahead = flow

    def forget(self) -> None:
        """Drops what a failed step has left behind: the next one must not find it. To be called where a step of torch's
        own schedules fails; `overlap_pairs` does so for its pairs.
        """
        self._flow_ahead, self._weight_work = None, ()

    def build_weight_step(self) -> Callable[[], None]:
        """What is left to do for the weights after the last backward pass: to be called once."""
        work, self._weight_work = self._weight_work, ()

        def step() -> None:
            for each in work:
                each()

        return step

    def _backward(self, flow: Flow, grads: Grads) -> Grads:
        if not flow.is_differentiated:
            flow.set_output_grads(grads)
            run(backward(flow.num_layers, with_weights=not self._defers_weights), {0: flow})
            self._weight_work += flow.take_weight_work()
        return flow.take_input_grads()


def flow_behind(output: Tensor) -> Flow:
    """The micro-batch that a stage's output belongs to.

    Raises:
        ConfigError: the output is not that of a Stage.
    """
    flow = getattr(output.grad_fn, "flow", None)
    if not isinstance(flow, Flow):
        raise ConfigError(f"the stage's output comes from {output.grad_fn}, not from an overlap.Stage")
    return flow


class _StageNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, call: tuple[Stage, Flow], *state: Tensor) -> tuple[Tensor, ...]:
        ctx.stage, ctx.flow = call
        ctx.set_materialize_grads(False)
        outputs: tuple[Tensor, ...] = ctx.flow.take_outputs()
        ctx.mark_non_differentiable(*(each for each in outputs if not each.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, *ctx.stage._backward(ctx.flow, grads)
