"""What every bootstrap offers, and the errors that all of them raise in the same words."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

from commlib.errors import CommError, CommTimeout, ConfigError

__all__ = [
    "MAX_PAYLOAD_BYTES",
    "Bootstrap",
    "Deadline",
    "check_payload",
    "check_usable",
    "missing_ranks",
    "no_answer",
]

# A bootstrap carries addresses and sizes, never tokens. The bound keeps a stray peer from making us allocate at will.
MAX_PAYLOAD_BYTES = 64 << 20

_MAX_NAMED_RANKS = 16


@runtime_checkable
class Bootstrap(Protocol):
    """The control channel of one job: how ranks find each other and agree before the data path exists.

    All ranks make the same calls in the same order, one thread at a time. A timeout is terminal for the bootstrap: its
    later calls raise `CommError`.

    Attributes:
        rank: this process's rank, in ``0..size-1``.
        size: number of ranks.
    """

    rank: int
    size: int

    def allgather(self, payload: bytes, *, timeout_s: float) -> list[bytes]:
        """Gives every rank's payload to every rank.

        Args:
            payload: up to `MAX_PAYLOAD_BYTES` bytes; lengths may differ between ranks and may be 0.
            timeout_s: seconds within which all ranks must have called.

        Returns:
            `size` payloads, in rank order.

        Raises:
            CommTimeout: some ranks did not call in time; names them.
            CommError: the bootstrap is closed or failed before.
            ConfigError: the payload is too long.
        """
        ...

    def barrier(self, timeout_s: float) -> None:
        """Returns when all ranks have called it, or raises like `allgather`."""
        ...

    def close(self) -> None:
        """Lets go of sockets and communicators. Idempotent; waits for nobody."""
        ...

    def describe(self) -> str:
        """One line for logs: provider, address, rank and size."""
        ...


class Deadline:
    """A moment on the monotonic clock, `timeout_s` seconds after its construction.

    `reported_s` replaces `timeout_s` in messages, where the wait began before this object.
    """

    def __init__(self, timeout_s: float, *, reported_s: float | None = None) -> None:
        self.timeout_s = timeout_s if reported_s is None else reported_s
        self._end = time.monotonic() + timeout_s

    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())

    def has_passed(self) -> bool:
        return time.monotonic() >= self._end


def check_payload(payload: bytes) -> None:
    """Raises `ConfigError` if the payload is longer than a bootstrap carries."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise ConfigError(f"bootstrap payload of {len(payload)} bytes is longer than {MAX_PAYLOAD_BYTES}")


def check_usable(is_closed: bool, failure: str | None) -> None:
    """Raises `CommError` if the bootstrap is closed or has failed before."""
    if is_closed:
        raise CommError("this bootstrap is closed")
    if failure is not None:
        raise CommError(f"this bootstrap failed before: {failure}")


def missing_ranks(
    source: str, missing: Sequence[int], *, rank: int, size: int, seen: int, waited_s: float, tag: int
) -> CommTimeout:
    """The error of a rank that came for ranks that did not.

    Args:
        source: the provider, first word of the message.
        missing: the ranks that did not arrive, ascending, at least one.
        rank: this rank.
        size: number of ranks.
        seen: number of ranks that arrived.
        waited_s: seconds that were waited.
        tag: number of the call within its bootstrap.
    """
    return CommTimeout(
        f"{source}: {_name_ranks(missing)} of {size} did not arrive within {round(waited_s, 1):g} s",
        rank=rank,
        peer=missing[0] if len(missing) == 1 else None,
        channel="bootstrap",
        phase="rendezvous",
        tag=tag,
        expected=size,
        seen=seen,
    )


def no_answer(source: str, *, rank: int, size: int, waited_s: float, tag: int, where: str = "") -> CommTimeout:
    """The error of a rank that heard nothing from rank 0, the one that keeps the roll."""
    at = f" at {where}" if where else ""
    return CommTimeout(
        f"{source}: rank 0 of {size} did not answer{at} within {round(waited_s, 1):g} s",
        rank=rank,
        peer=0,
        channel="bootstrap",
        phase="rendezvous",
        tag=tag,
        expected=size,
        seen=0,
    )


def _name_ranks(ranks: Collection[int]) -> str:
    named = sorted(ranks)
    text = ", ".join(map(str, named[:_MAX_NAMED_RANKS]))
    if len(named) > _MAX_NAMED_RANKS:
        text += f" and {len(named) - _MAX_NAMED_RANKS} more"
    return f"rank{'s' if len(named) > 1 else ''} {text}"
