"""A Runtime that answers from memory: the same computation with communication replaced by nothing."""

from __future__ import annotations

from typing import Any

from commlib.runtime import Runtime

__all__ = ["Recording", "Replay"]


def _dispatch_key(options: dict[str, Any]) -> str:
    return "dispatch" if options.get("handle") is None else "dispatch again"


def _combine_key(options: dict[str, Any]) -> str:
    return "combine" if options.get("weight_grads") is None else "combine gradients"


class Recording:
    """Of one layer: passes everything on to the Runtime and keeps the last result of each kind.

    The kinds are those of a forward and a backward pass: rows out and home, gradients of rows home and out.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.results: dict[str, Any] = {}

    @property
    def trace(self) -> Any:
        return self._runtime.trace

    def dispatch_send(self, *arguments: Any, **options: Any) -> Any:
        return _dispatch_key(options), self._runtime.dispatch_send(*arguments, **options)

    def dispatch_recv(self, pending: Any) -> Any:
        key, pending = pending
        self.results[key] = self._runtime.dispatch_recv(pending)
        return self.results[key]

    def combine_send(self, *arguments: Any, **options: Any) -> Any:
        return _combine_key(options), self._runtime.combine_send(*arguments, **options)

    def combine_recv(self, pending: Any) -> Any:
        key, pending = pending
        self.results[key] = self._runtime.combine_recv(pending)
        return self.results[key]


class Replay:
    """Of one layer: gives what was recorded, at once."""

    trace = None

    def __init__(self, recorded: Recording) -> None:
        self._results = recorded.results

    def dispatch_send(self, *arguments: Any, **options: Any) -> Any:
        return _dispatch_key(options)

    def combine_send(self, *arguments: Any, **options: Any) -> Any:
        return _combine_key(options)

    def dispatch_recv(self, key: str) -> Any:
        return self._results[key]

    combine_recv = dispatch_recv
