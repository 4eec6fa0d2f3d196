"""Overlapped pairs inside the schedules of torch.distributed.pipelining.

torch's ScheduleDualPipeV says which forward and which backward pass may run side by side (OVERLAP_F_B), and runs them
one after the other; `overlap_pairs` has it run them in the order of `schedule.PAIR`. torch hands such functions its
schedule's and stages' own methods; this module is tested with those of torch 2.13.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.pipelining.schedules import OVERLAP_F_B

from commlib.errors import ConfigError
from commlib.overlap.flow import Flow, run
from commlib.overlap.schedule import forward_backward
from commlib.overlap.stage import Stage, flow_behind

__all__ = ["overlap_pairs"]


def overlap_pairs(schedule: Any) -> None:
    """Lets a schedule lay the passes of its OVERLAP_F_B actions side by side.

    Args:
        schedule: of torch.distributed.pipelining, with stages whose module is a `Stage(..., defers_weights=True)` and
            whose `dw_builder` is that stage's `build_weight_step`.

    Raises:
        ConfigError: a stage has another module.
    """
    for stage in schedule._stages:
        if not isinstance(stage.submod, Stage) or stage.dw_builder is None:
            raise ConfigError(
                f"stage {stage.stage_index} is a {type(stage.submod).__name__} with dw_builder={stage.dw_builder}, the "
                "rule: an overlap.Stage with its build_weight_step"
            )
    schedule.register_custom_function(OVERLAP_F_B, _run_pair)


def _run_pair(action: Any, context: Any) -> None:
    """What torch calls for an OVERLAP_F_B action of a forward and a backward pass."""
    schedule = context.schedule_ref
    try:
        _lay_side_by_side(schedule, action, context)
    except BaseException:
        for stage in schedule._stages:
            stage.submod.forget()
        raise


def _lay_side_by_side(schedule: Any, action: Any, context: Any) -> None:
    stages = {stage.stage_index: stage for stage in schedule._stages}
    forward, backward = action.sub_actions
    ahead, behind = stages[forward.stage_index], stages[backward.stage_index]
    coming, going = forward.microbatch_index, backward.microbatch_index
    _wait(schedule.fwd_recv_ops.pop((ahead.stage_index, coming), []))
    _wait(schedule.bwd_recv_ops.pop((behind.stage_index, going), []))

    inputs = context.arg_mbs[coming] if ahead.is_first else ahead._retrieve_recv_activations(coming)
    flow_ahead, flow_back = Flow(ahead.submod.layers, inputs), _start_back(schedule, behind, going)
    run(forward_backward(flow_ahead.num_layers, flow_back.num_layers), {0: flow_ahead, 1: flow_back})

    # The rest is torch's own bookkeeping; both calls find their work done.
    ahead.submod.expect(flow_ahead)
    output = ahead.forward_one_chunk(coming, context.arg_mbs[coming], context.kwarg_mbs[coming])
    schedule._maybe_compute_loss(ahead, output, context.target_mbs, coming)
    if ahead.stage_index + 1 in stages:
        stages[ahead.stage_index + 1].set_local_fwd_input(output, coming)
    schedule.backward_counter[behind.stage_index] += 1
    is_last = schedule.backward_counter[behind.stage_index] == schedule._n_microbatches
    behind.backward_one_chunk(
        going, loss=schedule._maybe_get_loss(behind, going), full_backward=True, last_backward=is_last
    )
    if behind.stage_index - 1 in stages:
        stages[behind.stage_index - 1].set_local_bwd_input(behind.get_local_bwd_output(going), going)


def _start_back(schedule: Any, stage: Any, batch: int) -> Flow:
    """The flow of a micro-batch, with the gradients of its outputs."""
    outputs: tuple[Tensor, ...] = stage.fwd_cache[batch][0]
    flow = flow_behind(outputs[0])
    if stage.is_last:
        wanted = [each for each in outputs if each.requires_grad]
        # The loss is differentiated again by torch's own backward pass, which then finds the stage's work done.
        found = iter(torch.autograd.grad(schedule._maybe_get_loss(stage, batch), wanted, retain_graph=True))
        flow.set_output_grads([next(found) if each.requires_grad else None for each in outputs])
    else:
        flow.set_output_grads(stage._retrieve_recv_grads(batch))
    return flow


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()
