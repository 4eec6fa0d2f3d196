"""Events: when what was called is over, as seen from a CUDA stream. On the CPU everything is over when a call returns.

A Runtime chains its work on the current stream, so the event of a call is one recorded there after it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

__all__ = ["EventHandle", "EventOverlap", "event_after", "wait_for"]


class EventHandle:
    """A point in the current CUDA stream; already passed in a process that has not touched CUDA."""

    def __init__(self) -> None:
        self._event: Any = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # torch's own events cost the host more. Here: clients on CPUs need nothing of CUDA.
            from commlib.cuda.driver import Event
            from commlib.cuda.units import current_stream

            stream = current_stream()
            self._event = Event()
            self._event.record(stream)

    def current_stream_wait(self) -> None:
        """Work that is put on the current stream from now on comes after the point."""
        if self._event is not None:
            from commlib.cuda.units import current_stream

            self._event.wait(current_stream())


class EventOverlap:
    """An event, or none, and what hangs on it. As a context manager it waits on leaving.

    Args:
        event: None = nothing to wait for.
        extra_tensors: kept alive with the event.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[Any, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], None] | None = None
        self._releases_on_exit = False

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """The current stream waits for the event, if there is one; then the hook runs, once.

        Args:
            release_handle: drop the event afterwards.
        """
        if self.event is not None:
            self.event.current_stream_wait()
        if self.hook_after_wait is not None:
            hook, self.hook_after_wait = self.hook_after_wait, None
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, hook_after_wait: Callable[[], None]) -> None:
        """Runs `hook_after_wait` at the end of the next `current_stream_wait`."""
        if self.hook_after_wait is not None:
            raise RuntimeError("this EventOverlap has a hook already")
        self.hook_after_wait = hook_after_wait

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """For ``with event(release_handle=True):``."""
        self._releases_on_exit = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.current_stream_wait(release_handle=self._releases_on_exit)
        self._releases_on_exit = False


def wait_for(event: EventOverlap | EventHandle | None) -> None:
    """The current stream waits for what a client passed as `previous_event`: either kind, or None."""
    if event is not None:
        event.current_stream_wait()


def event_after(is_async: bool) -> EventOverlap:
    """The event to return from a call. A client that did not ask for one gets an empty one."""
    return EventOverlap(EventHandle() if is_async else None)
