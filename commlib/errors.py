"""The exceptions of commlib: each carries the values that its message names.

All of them survive pickling (ranks hand them to a launcher or a test process), attributes included.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CapacityError",
    "CommError",
    "CommTimeout",
    "ConfigError",
    "PeerLostError",
    "TransportError",
]


def _rebuild(cls: type[CommError], args: tuple[Any, ...], values: dict[str, Any]) -> CommError:
    """Recreates a pickled error without calling `__init__`, whose keyword-only arguments pickle cannot pass."""
    error = cls.__new__(cls, *args)
    error.__dict__.update(values)
    return error


class CommError(RuntimeError):
    """Base of everything commlib raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class ConfigError(CommError, ValueError):
    """A value that the caller chose breaks a rule; the message holds the value and the rule."""


class TransportError(CommError):
    """A call into the network library failed.

    Attributes:
        call: the function that failed, for example ``"ucp_put_nbx"``.
        code: its status code, as returned by the library.
        peer: the rank at the other end, or None if the call concerns no single peer.
    """

    def __init__(self, message: str, *, call: str, code: int, peer: int | None = None) -> None:
        super().__init__(message)
        self.call = call
        self.code = code
        self.peer = peer


class CommTimeout(CommError):
    """A wait passed its deadline.

    Attributes:
        rank: the rank that waited.
        peer: the rank it waited for, or None if it waited for several.
        channel: the channel it waited on.
        phase: the step of the operation, for example ``"exchange"``.
        tag: what tells this wait from others on the channel (the epoch).
        expected: the count that would have ended the wait.
        seen: the count at the deadline.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int,
        peer: int | None,
        channel: str,
        phase: str,
        tag: int,
        expected: int,
        seen: int,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.peer = peer
        self.channel = channel
        self.phase = phase
        self.tag = tag
        self.expected = expected
        self.seen = seen


class PeerLostError(CommError):
    """A peer stopped: its heartbeat is overdue or its connection broke.

    Attributes:
        rank: the rank that noticed.
        peer: the lost rank.
        channel: the channel on which it was noticed.
        phase: the step of the operation in which it was noticed.
    """

    def __init__(self, message: str, *, rank: int, peer: int, channel: str, phase: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.peer = peer
        self.channel = channel
        self.phase = phase


class CapacityError(CommError):
    """Memory does not suffice for an operation.

    Attributes:
        needed: bytes that the operation needs.
        available: bytes that there are.
    """

    def __init__(self, message: str, *, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed = needed
        self.available = available
