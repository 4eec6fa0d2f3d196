"""Schedules are data: their order, what stands between send and receive, how they print."""

from __future__ import annotations

import itertools

import pytest

from commlib.overlap import schedule
from commlib.overlap.schedule import Direction, Half, Phase, Schedule, Step, Task

F, B, W = Direction

ALL = {
    "forward": schedule.forward(3),
    "backward": schedule.backward(3),
    "two batches forward": schedule.two_batches_forward(3),
    "two batches backward": schedule.two_batches_backward(3),
    "pair": schedule.forward_backward(3, 3),
    "more forward": schedule.forward_backward(3, 1),
    "more backward": schedule.forward_backward(1, 3),
    "only backward": schedule.forward_backward(0, 2),
}


def compute(steps: Schedule) -> list[Task]:
    return [step.task for step in steps if step.half is Half.WHOLE]


def between(steps: Schedule, task: Task) -> list[tuple[Phase, Direction]]:
    """What is computed while `task` is under way."""
    places = {step: place for place, step in enumerate(steps)}
    first, last = places[Step(task, Half.SEND)], places[Step(task, Half.RECV)]
    inside = [step.task for step in steps.steps[first + 1 : last] if step.half is Half.WHOLE]
    return [(each.phase, each.direction) for each in inside]


def test_a_pair_follows_the_published_trace() -> None:
    """combine(B), attn(F), mlp(B), dispatch(F), dispatch(B), mlp(W), mlp(F), attn(B), attn(W), combine(F)."""
    names = [f"{phase}({direction})" for phase, direction in schedule.PAIR]
    assert names == [
        *("combine(B)", "attention(F)", "mlp(B)", "dispatch(F)", "dispatch(B)"),
        *("mlp(W)", "mlp(F)", "attention(B)", "attention(W)", "combine(F)"),
    ]
    steps = schedule.forward_backward(2, 2)
    on_stream = [(s.task.phase, s.task.direction) for s in steps if s.half is Half.SEND]
    computed = [(task.phase, task.direction) for task in compute(steps)]
    assert on_stream == 2 * [each for each in schedule.PAIR if each[0].is_communication]
    assert computed == 2 * [each for each in schedule.PAIR if not each[0].is_communication]


def test_in_a_pair_every_operation_but_the_last_is_under_computation() -> None:
    steps = schedule.forward_backward(2, 2)
    assert between(steps, Task(Phase.COMBINE, B, 1, 1)) == [(Phase.ATTENTION, F)]
    assert between(steps, Task(Phase.DISPATCH, F, 0, 0)) == [(Phase.MLP, B), (Phase.MLP, W)]
    assert between(steps, Task(Phase.DISPATCH, B, 1, 1)) == [(Phase.MLP, W), (Phase.MLP, F)]
    assert between(steps, Task(Phase.COMBINE, F, 0, 0)) == [(Phase.ATTENTION, B), (Phase.ATTENTION, W)]
    assert between(steps, Task(Phase.COMBINE, B, 1, 0)) == [(Phase.ATTENTION, W), (Phase.ATTENTION, F)]


def test_two_batches_hide_one_another() -> None:
    steps = schedule.two_batches_forward(2)
    assert between(steps, Task(Phase.DISPATCH, F, 0, 0)) == [(Phase.ATTENTION, F)]
    assert between(steps, Task(Phase.DISPATCH, F, 1, 0)) == [(Phase.MLP, F)]
    assert between(steps, Task(Phase.COMBINE, F, 0, 0)) == [(Phase.MLP, F)]
    assert between(steps, Task(Phase.COMBINE, F, 1, 0)) == [(Phase.ATTENTION, F)]
    steps = schedule.two_batches_backward(2)
    for layer, batch in ((1, 0), (1, 1), (0, 0), (0, 1)):
        assert (Phase.MLP, W) in between(steps, Task(Phase.DISPATCH, B, batch, layer))
    assert (Phase.ATTENTION, W) in between(steps, Task(Phase.COMBINE, B, 0, 0))


@pytest.mark.parametrize("name", ALL)
def test_every_task_once_in_an_order_that_can_be_carried_out(name: str) -> None:
    steps = ALL[name]
    assert len(set(steps)) == len(steps)
    places = {step: place for place, step in enumerate(steps)}
    for step in steps:
        if step.half is Half.RECV:
            assert places[Step(step.task, Half.SEND)] < places[step]
    forward_order = (Phase.ATTENTION, Phase.DISPATCH, Phase.MLP, Phase.COMBINE)
    backward_order = (Phase.COMBINE, Phase.MLP, Phase.DISPATCH, Phase.ATTENTION)
    for batch, direction in itertools.product((0, 1), (F, B)):
        chain = [step for step in steps if step.task.batch == batch and step.task.direction is direction]
        layers = {step.task.layer for step in chain}
        expected = []
        for layer in sorted(layers, reverse=direction is B):
            for phase in forward_order if direction is F else backward_order:
                task = Task(phase, direction, batch, layer)
                halves = (Half.SEND, Half.RECV) if phase.is_communication else (Half.WHOLE,)
                expected += [Step(task, half) for half in halves]
        assert chain == expected, "each step finds its data"
        for layer, phase in itertools.product(layers, (Phase.MLP, Phase.ATTENTION)):
            if direction is B:
                task = Task(phase, W, batch, layer)
                assert places[Step(Task(phase, B, batch, layer), Half.WHOLE)] < places[Step(task, Half.WHOLE)]


def test_gradients_of_weights_can_be_left_out() -> None:
    for steps in (
        schedule.backward(2, with_weights=False),
        schedule.two_batches_backward(2, with_weights=False),
        schedule.forward_backward(2, 2, with_weights=False),
    ):
        assert W not in {step.task.direction for step in steps}
        assert B in {step.task.direction for step in steps}


def test_prints_numbered_steps() -> None:
    lines = str(schedule.forward(1, batch=3)).splitlines()
    assert lines == [
        "   0  attention(F)       batch 3  layer 0",
        "   1  dispatch(F).send   batch 3  layer 0",
        "   2  dispatch(F).recv   batch 3  layer 0",
        "   3  mlp(F)             batch 3  layer 0",
        "   4  combine(F).send    batch 3  layer 0",
        "   5  combine(F).recv    batch 3  layer 0",
    ]
