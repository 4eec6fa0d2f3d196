"""The bootstrap of a job with one rank."""

from __future__ import annotations

from commlib.bootstrap.interface import check_payload, check_usable

__all__ = ["SingleBootstrap"]


class SingleBootstrap:
    """Rank 0 of 1: every call returns at once. Implements `Bootstrap`."""

    def __init__(self) -> None:
        self.rank = 0
        self.size = 1
        self._is_closed = False

    def allgather(self, payload: bytes, *, timeout_s: float) -> list[bytes]:
        """See `Bootstrap.allgather`; returns ``[payload]``."""
        check_usable(self._is_closed, None)
        check_payload(payload)
        return [bytes(payload)]

    def barrier(self, timeout_s: float) -> None:
        """See `Bootstrap.barrier`."""
        check_usable(self._is_closed, None)

    def close(self) -> None:
        """See `Bootstrap.close`."""
        self._is_closed = True

    def describe(self) -> str:
        """See `Bootstrap.describe`."""
        return "single process, rank 0 of 1"
