"""Communication hidden behind computation: schedules as data, and what carries them out.

A layer in three pieces (`Layer`) goes through a `Schedule` as a `Flow`, alone, beside a second micro-batch, or forward
beside another one's backward pass. `Stage` makes a module of several layers; `Pipeline` runs stages as DualPipe or
DualPipeV, `commlib.overlap.torch_schedule` inside torch.distributed.pipelining.
"""

from __future__ import annotations

from commlib.overlap.flow import Flow, run
from commlib.overlap.layer import Attended, Exchange, Layer, State, run_layer
from commlib.overlap.pipeline import Pipeline
from commlib.overlap.pipeline_plan import PipelinePlan, Place, dualpipe, dualpipe_v
from commlib.overlap.schedule import (
    Direction,
    Half,
    Phase,
    Schedule,
    Step,
    Task,
    backward,
    forward,
    forward_backward,
    two_batches_backward,
    two_batches_forward,
)
from commlib.overlap.stage import Stage
from commlib.overlap.weight_grads import WeightGradStore, grouped_linear, linear

__all__ = [
    "Attended",
    "Direction",
    "Exchange",
    "Flow",
    "Half",
    "Layer",
    "Phase",
    "Pipeline",
    "PipelinePlan",
    "Place",
    "Schedule",
    "Stage",
    "State",
    "Step",
    "Task",
    "WeightGradStore",
    "backward",
    "dualpipe",
    "dualpipe_v",
    "forward",
    "forward_backward",
    "grouped_linear",
    "linear",
    "run",
    "run_layer",
    "two_batches_backward",
    "two_batches_forward",
]
