"""Schedules as data: numbered steps that say what is computed and what is in flight meanwhile.

A layer is cut into attention, dispatch, MLP and combine; its backward pass into the same four from behind, where
attention and MLP give the gradients of their inputs (B) and of their weights (W) in steps of their own. A schedule is
first a list of tasks in the order of their starts; then communication tasks are cut in halves: the send moves up
to right behind the step that makes its data, the receive down to right before the step that needs it. What stands in
between is computed while bytes move.

The order of a forward and a backward layer side by side is that of DeepSeek-V3's published training trace (its
"chunk" is a layer here); the split into B and W is that of zero bubble pipelining (arXiv 2401.10241).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "PAIR",
    "TWO_BATCHES",
    "Direction",
    "Half",
    "Phase",
    "Schedule",
    "Step",
    "Task",
    "backward",
    "forward",
    "forward_backward",
    "in_halves",
    "two_batches_backward",
    "two_batches_forward",
]


class Phase(StrEnum):
    """Part of a layer."""

    ATTENTION = "attention"  # and all that comes before the experts: norms, gate, shared experts
    DISPATCH = "dispatch"
    MLP = "mlp"  # the routed experts
    COMBINE = "combine"  # and the step from its sum to the layer's output

    @property
    def is_communication(self) -> bool:
        return self in (Phase.DISPATCH, Phase.COMBINE)


class Direction(StrEnum):
    """Forward, backward to the inputs, backward to the weights."""

    F = "F"
    B = "B"
    W = "W"


class Half(StrEnum):
    """Of a communication task; computation is WHOLE."""

    WHOLE = ""
    SEND = "send"
    RECV = "recv"


@dataclass(frozen=True)
class Task:
    """A phase of one layer for one micro-batch (`batch` is its name within the schedule)."""

    phase: Phase
    direction: Direction
    batch: int
    layer: int


@dataclass(frozen=True)
class Step:
    """A task, or the half of one."""

    task: Task
    half: Half

    def __str__(self) -> str:
        task = self.task
        name = f"{task.phase}({task.direction})" + (f".{self.half}" if self.half else "")
        return f"{name:18} batch {task.batch}  layer {task.layer}"


@dataclass(frozen=True)
class Schedule:
    """Steps in the order in which one rank makes them; the same on all ranks that communicate with one another."""

    steps: tuple[Step, ...]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __str__(self) -> str:
        return "\n".join(f"{number:4}  {step}" for number, step in enumerate(self.steps))


_F, _B, _W = Direction.F, Direction.B, Direction.W
_ATTENTION, _DISPATCH, _MLP, _COMBINE = Phase

_FORWARD = ((_ATTENTION, _F), (_DISPATCH, _F), (_MLP, _F), (_COMBINE, _F))
_BACKWARD = ((_COMBINE, _B), (_MLP, _B), (_DISPATCH, _B), (_MLP, _W), (_ATTENTION, _B), (_ATTENTION, _W))

# A forward layer of one micro-batch beside a backward layer of another.
PAIR = (
    (_COMBINE, _B),
    (_ATTENTION, _F),
    (_MLP, _B),
    (_DISPATCH, _F),
    (_DISPATCH, _B),
    (_MLP, _W),
    (_MLP, _F),
    (_ATTENTION, _B),
    (_ATTENTION, _W),
    (_COMBINE, _F),
)

# Two micro-batches in the same layer, half a layer apart: one computes while the other one's rows move.
TWO_BATCHES = {
    _F: (
        *((0, _ATTENTION, _F), (0, _DISPATCH, _F), (1, _ATTENTION, _F), (1, _DISPATCH, _F)),
        *((0, _MLP, _F), (0, _COMBINE, _F), (1, _MLP, _F), (1, _COMBINE, _F)),
    ),
    _B: (
        *((0, _COMBINE, _B), (1, _COMBINE, _B)),
        *((0, _MLP, _B), (0, _DISPATCH, _B), (0, _MLP, _W), (1, _MLP, _B), (1, _DISPATCH, _B), (1, _MLP, _W)),
        *((0, _ATTENTION, _B), (0, _ATTENTION, _W), (1, _ATTENTION, _B), (1, _ATTENTION, _W)),
    ),
}


def forward(num_layers: int, batch: int = 0) -> Schedule:
    """One micro-batch alone; nothing overlaps."""
    return in_halves(_forward_tasks(range(num_layers), batch))


def backward(num_layers: int, batch: int = 0, *, with_weights: bool = True) -> Schedule:
    """One micro-batch alone: gradients of weights while rows move. Without them, they are left to the caller."""
    return in_halves(_without_weights(_backward_tasks(range(num_layers), batch), with_weights))


def two_batches_forward(num_layers: int, batches: tuple[int, int] = (0, 1)) -> Schedule:
    """Two micro-batches in flight within each layer."""
    layers = range(num_layers)
    return in_halves(
        Task(phase, direction, batches[which], layer) for layer in layers for which, phase, direction in TWO_BATCHES[_F]
    )


def two_batches_backward(num_layers: int, batches: tuple[int, int] = (0, 1), *, with_weights: bool = True) -> Schedule:
    """The backward passes of two micro-batches in flight within each layer."""
    tasks = [
        Task(phase, direction, batches[which], layer)
        for layer in reversed(range(num_layers))
        for which, phase, direction in TWO_BATCHES[_B]
    ]
    return in_halves(_without_weights(tasks, with_weights))


def forward_backward(
    num_forward_layers: int,
    num_backward_layers: int,
    *,
    forward_batch: int = 0,
    backward_batch: int = 1,
    with_weights: bool = True,
) -> Schedule:
    """A forward pass beside the backward pass of another micro-batch, layer by layer in the order `PAIR`.

    Layers without a partner (one of the two stages is longer) come last, alone.
    """
    num_pairs = min(num_forward_layers, num_backward_layers)
    tasks = []
    for pair in range(num_pairs):
        for phase, direction in PAIR:
            is_forward = direction is _F
            layer = pair if is_forward else num_backward_layers - 1 - pair
            tasks.append(Task(phase, direction, forward_batch if is_forward else backward_batch, layer))
    tasks += _forward_tasks(range(num_pairs, num_forward_layers), forward_batch)
    tasks += _backward_tasks(range(num_backward_layers - num_pairs), backward_batch)
    return in_halves(_without_weights(tasks, with_weights))


def in_halves(tasks: Iterable[Task]) -> Schedule:
    """Cuts communication in halves and moves them as far apart as the micro-batch's own chain of steps allows.

    Sends keep the order of the tasks: that is the order in which all ranks issue their operations.
    """
    tasks = list(tasks)
    sends: dict[int, list[Task]] = {}  # after the task of this index, -1: before all
    recvs: dict[int, list[Task]] = {}  # before the task of this index
    earliest = -1
    for place, task in enumerate(tasks):
        if task.phase.is_communication:
            earliest = max(earliest, _last_of_chain(tasks[:place], task))
            sends.setdefault(earliest, []).append(task)
            recvs.setdefault(_next_of_chain(tasks, place), []).append(task)
    steps = [Step(task, Half.SEND) for task in sends.get(-1, [])]
    for place, task in enumerate(tasks):
        steps += [Step(each, Half.RECV) for each in recvs.get(place, [])]
        if not task.phase.is_communication:
            steps.append(Step(task, Half.WHOLE))
        steps += [Step(each, Half.SEND) for each in sends.get(place, [])]
    steps += [Step(each, Half.RECV) for each in recvs.get(len(tasks), [])]
    return Schedule(tuple(steps))


def _is_same_chain(one: Task, other: Task) -> bool:
    """Whether one waits for the other: the forward steps of a micro-batch, or its backward steps but W."""
    return one.batch == other.batch and one.direction is other.direction


def _last_of_chain(tasks: Sequence[Task], task: Task) -> int:
    return next((place for place in reversed(range(len(tasks))) if _is_same_chain(tasks[place], task)), -1)


def _next_of_chain(tasks: Sequence[Task], place: int) -> int:
    later = range(place + 1, len(tasks))
    return next((other for other in later if _is_same_chain(tasks[other], tasks[place])), len(tasks))


def _forward_tasks(layers: Iterable[int], batch: int) -> list[Task]:
    return [Task(phase, direction, batch, layer) for layer in layers for phase, direction in _FORWARD]


def _backward_tasks(layers: Sequence[int], batch: int) -> list[Task]:
    return [Task(phase, direction, batch, layer) for layer in reversed(layers) for phase, direction in _BACKWARD]


def _without_weights(tasks: list[Task], with_weights: bool) -> list[Task]:
    return [task for task in tasks if with_weights or task.direction is not _W]
