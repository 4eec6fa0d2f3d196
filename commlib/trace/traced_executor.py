"""An executor that tells the recorder when the caller waits for it. In place of the plain one while a trace is taken,
so that calls cost nothing more without."""

from __future__ import annotations

from typing import Any

from commlib.executor import CombineCall, DispatchCall, Executor
from commlib.handle import Combined, Dispatched
from commlib.trace.recorder import Recorder

__all__ = ["TracedExecutor"]


class TracedExecutor:
    """`Executor` around another one."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.recorder = Recorder(inner.start_trace())

    def dispatch_recv(self, pending: Any) -> Dispatched:
        with self.recorder.waiting():
            return self.inner.dispatch_recv(pending)

    def dispatch(self, call: DispatchCall) -> Dispatched:
        with self.recorder.waiting():
            return self.inner.dispatch(call)

    def combine_recv(self, pending: Any) -> Combined:
        with self.recorder.waiting():
            return self.inner.combine_recv(pending)

    def combine(self, call: CombineCall) -> Combined:
        with self.recorder.waiting():
            return self.inner.combine(call)

    def barrier(self) -> None:
        with self.recorder.waiting():
            self.inner.barrier()

    def __getattr__(self, name: str) -> Any:
        """First halves, and all that does not wait."""
        return getattr(self.inner, name)
