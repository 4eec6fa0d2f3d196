"""Notes what the caller's own thread does: steps, and computation between waits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from commlib.trace.spans import Span

__all__ = ["Clock", "HostClock", "Recorder"]


class Clock(Protocol):
    """Time as the executor counts it. A GPU's is known only when the stream has come there, hence marks."""

    def mark(self) -> Any:
        """Now."""

    def seconds(self, mark: Any) -> float:
        """When a mark was; after all work is done."""


class HostClock:
    """CLOCK_MONOTONIC, as in the native core."""

    def mark(self) -> float:
        return time.monotonic()

    def seconds(self, mark: float) -> float:
        return mark


class Recorder:
    """The `step` and `compute` lanes of a rank. One thread at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._noted: list[tuple[str, str, Any, Any]] = []  # lane, name, begin, end
        self._piece: tuple[str, Any] | None = None  # of computation: name, begin
        self._name: str | None = None  # of the computation that a wait has interrupted

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Inside is one training step."""
        begin = self._clock.mark()
        try:
            yield
        finally:
            self._noted.append(("step", name, begin, self._clock.mark()))

    @contextmanager
    def compute(self, name: str) -> Iterator[None]:
        """Inside, all is computation but waits for the Runtime. Does not nest."""
        assert self._name is None, f"compute({name!r}) inside of compute({self._name!r})"
        self._name = name
        self._begin_piece()
        try:
            yield
        finally:
            self._end_piece()
            self._name = None

    @contextmanager
    def labelled(self, name: str) -> Iterator[None]:
        """Inside, computation is called `name`; only within `compute`."""
        before = self._name
        if before is None:
            yield
            return
        self._end_piece()
        self._name = name
        self._begin_piece()
        try:
            yield
        finally:
            self._end_piece()
            self._name = before
            self._begin_piece()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside the caller waits for the Runtime."""
        self._end_piece()
        try:
            yield
        finally:
            self._begin_piece()

    def spans(self) -> list[Span]:
        """All that was noted."""
        seconds = self._clock.seconds
        return [Span(lane, name, seconds(begin), seconds(end)) for lane, name, begin, end in self._noted]

    def _begin_piece(self) -> None:
        if self._name is not None:
            self._piece = self._name, self._clock.mark()

    def _end_piece(self) -> None:
        piece, self._piece = self._piece, None
        if piece is not None:
            name, begin = piece
            self._noted.append(("compute", name, begin, self._clock.mark()))
