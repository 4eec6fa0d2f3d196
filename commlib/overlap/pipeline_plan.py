"""Pipelines as data: what each rank computes, sends and receives, in which order.

Every rank holds two stages of the model ("legs"), so that a forward pass through one runs beside a backward pass
through the other. DualPipe (DeepSeek-V3, arXiv 2412.19437, section 3.2.1) feeds micro-batches from both ends: leg 0 of
rank r is stage r, leg 1 is stage `num_ranks - 1 - r`, and every stage exists twice. DualPipeV is one half of that,
folded: leg 0 of rank r is stage r, leg 1 is stage `2 num_ranks - 1 - r`; a micro-batch goes down one leg and up the
other. In both, a rank makes the same eight series of steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from commlib.errors import ConfigError

__all__ = ["Action", "Kind", "Part", "PipelinePlan", "Place", "dualpipe", "dualpipe_v"]


class Place(NamedTuple):
    """Where a stage is: a rank of the pipeline and one of its two stages."""

    rank: int
    leg: int


class Part(NamedTuple):
    """A micro-batch on one leg of a rank. In DualPipe each direction numbers its micro-batches from 0."""

    leg: int
    batch: int


class Kind(StrEnum):
    FORWARD = "F"
    BACKWARD = "B"  # inputs and weights
    BACKWARD_INPUT = "I"
    WEIGHTS = "W"  # of the oldest BACKWARD_INPUT that has none yet
    PAIR = "FB"  # FORWARD of one micro-batch beside BACKWARD of another
    SEND_FORWARD = "send F"
    RECV_FORWARD = "recv F"
    SEND_BACKWARD = "send B"
    RECV_BACKWARD = "recv B"


@dataclass(frozen=True, kw_only=True)
class Action:
    """One entry of a rank's list.

    Attributes:
        forward: what goes forward, or is sent or received on its way forward.
        backward: the same for backward.
        peer: rank of the pipeline at the other end of a transfer.
    """

    kind: Kind
    forward: Part | None = None
    backward: Part | None = None
    peer: int | None = None

    def __str__(self) -> str:
        parts = [f"leg {part.leg} batch {part.batch}" for part in (self.forward, self.backward) if part is not None]
        arrow = "" if self.peer is None else f"  {'from' if self.kind.startswith('recv') else 'to'} rank {self.peer}"
        return f"{self.kind:6} {' | '.join(parts)}{arrow}"


@dataclass(frozen=True)
class PipelinePlan:
    """The lists of all ranks.

    Attributes:
        name: "dualpipe" or "dualpipe_v".
        num_ranks: ranks of the pipeline.
        num_batches: micro-batches per direction in DualPipe, in all in DualPipeV.
        actions: per rank, numbered by their place. Both ends of a pair of ranks have their transfers in one order.
    """

    name: str
    num_ranks: int
    num_batches: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        return self.num_ranks if self.name == "dualpipe" else 2 * self.num_ranks

    def stage(self, place: Place) -> int:
        """Which stage of the model is there."""
        return place.rank if place.leg == 0 else self.num_stages - 1 - place.rank

    def before(self, place: Place) -> Place | None:
        """Where a micro-batch comes from; None where it enters."""
        return _neighbours(self.name, self.num_ranks, place)[0]

    def after(self, place: Place) -> Place | None:
        """Where a micro-batch goes to; None where it ends."""
        return _neighbours(self.name, self.num_ranks, place)[1]

    def describe(self, rank: int) -> str:
        """The numbered list of one rank."""
        return "\n".join(f"{number:4}  {action}" for number, action in enumerate(self.actions[rank]))


def dualpipe(num_ranks: int, num_batches: int) -> PipelinePlan:
    """DualPipe.

    Args:
        num_ranks: even.
        num_batches: micro-batches per direction, at least `num_ranks`.

    Raises:
        ConfigError: numbers that the eight series have no room for.
    """
    if num_ranks < 2 or num_ranks % 2:
        raise ConfigError(f"num_ranks={num_ranks} of DualPipe is not an even number >= 2")
    if num_batches < num_ranks:
        raise ConfigError(f"num_batches={num_batches} per direction is below num_ranks={num_ranks}")
    half, lists = num_ranks // 2, []
    for rank in range(num_ranks):
        near = 0 if rank < half else 1  # the leg whose micro-batches enter at this half of the ranks
        lists.append(_eight_series(half, min(rank, num_ranks - 1 - rank), num_batches, near))
    return _with_transfers("dualpipe", num_ranks, num_batches, lists)


def dualpipe_v(num_ranks: int, num_batches: int) -> PipelinePlan:
    """DualPipeV.

    Args:
        num_ranks: at least 1.
        num_batches: at least `2 * num_ranks`.

    Raises:
        ConfigError: numbers that the eight series have no room for.
    """
    if num_ranks < 1:
        raise ConfigError(f"num_ranks={num_ranks} is below 1")
    if num_batches < 2 * num_ranks:
        raise ConfigError(f"num_batches={num_batches} is below 2 * num_ranks={2 * num_ranks}")
    lists = [_eight_series(num_ranks, rank, num_batches, 0) for rank in range(num_ranks)]
    return _with_transfers("dualpipe_v", num_ranks, num_batches, lists)


class _Series:
    """A rank's computations, written down in order; `near` and `far` are its legs."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._forward = [0, 0]
        self._backward = [0, 0]
        self._without_weights: deque[Part] = deque()

    def forward(self, leg: int) -> None:
        self.actions.append(Action(kind=Kind.FORWARD, forward=self._next(self._forward, leg)))

    def backward(self, leg: int, *, is_split: bool = False) -> None:
        part = self._next(self._backward, leg)
        self.actions.append(Action(kind=Kind.BACKWARD_INPUT if is_split else Kind.BACKWARD, backward=part))
        if is_split:
            self._without_weights.append(part)

    def weights(self) -> None:
        self.actions.append(Action(kind=Kind.WEIGHTS, backward=self._without_weights.popleft()))

    def pair(self, forward_leg: int, backward_leg: int) -> None:
        forward, backward = self._next(self._forward, forward_leg), self._next(self._backward, backward_leg)
        self.actions.append(Action(kind=Kind.PAIR, forward=forward, backward=backward))

    @staticmethod
    def _next(counters: list[int], leg: int) -> Part:
        counters[leg] += 1
        return Part(leg, counters[leg] - 1)


def _eight_series(depth: int, position: int, num_batches: int, near: int) -> list[Action]:
    """The computations of the rank at `position` of `depth`, counted from where the near leg's micro-batches enter."""
    series, far, behind = _Series(), 1 - near, depth - position - 1
    for _ in range(2 * behind):  # 1
        series.forward(near)
    for _ in range(position + 1):  # 2
        series.forward(near)
        series.forward(far)
    for _ in range(behind):  # 3
        series.backward(far, is_split=True)
        series.weights()
        series.forward(far)
    for turn in range(num_batches - 2 * depth + position + 1):  # 4
        if turn == 0 and behind == 0:
            # Apart: the other ranks of the pipeline wait for the forward pass alone.
            series.forward(near)
            series.backward(far)
        else:
            series.pair(near, far)
        series.pair(far, near)
    for _ in range(behind):  # 5
        series.backward(far)
        series.pair(far, near)
    # 6: from the middle on weights are put off, on neighbouring ranks half a turn apart.
    middle, is_odd = (position + 1) // 2, position % 2 == 1
    for turn in range(position + 1):
        series.backward(far, is_split=turn > middle or (turn == middle and is_odd))
        series.backward(near, is_split=turn >= middle)
    for _ in range(behind):  # 7
        series.weights()
        series.backward(near, is_split=True)
    for _ in range(position + 1):  # 8
        series.weights()
    return series.actions


def _neighbours(name: str, num_ranks: int, place: Place) -> tuple[Place | None, Place | None]:
    """Where micro-batches at `place` come from and go to."""
    rank, leg = place
    up = Place(rank - 1, leg) if rank > 0 else None
    down = Place(rank + 1, leg) if rank < num_ranks - 1 else None
    if name == "dualpipe_v" and down is None:
        down = Place(rank, 1 - leg)  # the fold
    return (up, down) if leg == 0 else (down, up)


def _with_transfers(name: str, num_ranks: int, num_batches: int, lists: Sequence[Sequence[Action]]) -> PipelinePlan:
    """Adds sends where data is made and receives, on the other rank, at that same moment of a simulated run."""
    actions: list[list[Action]] = [[] for _ in lists]
    done: set[tuple[str, Place, int]] = set()
    waiting = [deque(each) for each in lists]

    def is_ready(rank: int, action: Action) -> bool:
        if action.forward is not None:
            before = _neighbours(name, num_ranks, Place(rank, action.forward.leg))[0]
            if before is not None and ("F", before, action.forward.batch) not in done:
                return False
        if action.backward is not None:
            place = Place(rank, action.backward.leg)
            after = _neighbours(name, num_ranks, place)[1]
            needed = ("F", place) if after is None else ("B", after)
            return (*needed, action.backward.batch) in done
        return True

    def carry_out(rank: int, action: Action) -> None:
        actions[rank].append(action)
        if action.forward is not None:
            hand_on(rank, "F", action.forward, Kind.SEND_FORWARD, Kind.RECV_FORWARD)
        if action.backward is not None and action.kind is not Kind.WEIGHTS:
            hand_on(rank, "B", action.backward, Kind.SEND_BACKWARD, Kind.RECV_BACKWARD)

    def hand_on(rank: int, direction: str, part: Part, send: Kind, recv: Kind) -> None:
        place = Place(rank, part.leg)
        done.add((direction, place, part.batch))
        target = _neighbours(name, num_ranks, place)[1 if direction == "F" else 0]
        if target is not None and target.rank != rank:
            side = "forward" if direction == "F" else "backward"
            actions[rank].append(Action(kind=send, peer=target.rank, **{side: part}))
            actions[target.rank].append(Action(kind=recv, peer=rank, **{side: part}))

    while any(waiting):
        # All that can start with what was there before this round, as ranks run side by side.
        ready = [(rank, queue) for rank, queue in enumerate(waiting) if queue and is_ready(rank, queue[0])]
        assert ready, f"{name}: {num_ranks} ranks with {num_batches} micro-batches wait for one another"
        for rank, queue in ready:
            carry_out(rank, queue.popleft())
    return PipelinePlan(name, num_ranks, num_batches, tuple(tuple(each) for each in actions))
