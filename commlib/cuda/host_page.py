"""A page of host memory that all ranks of a node share: who is alive, and what nobody maps any more."""

from __future__ import annotations

import json
import mmap
import os
import select
import time
from collections.abc import Sequence

import numpy as np

from commlib.bootstrap import Bootstrap
from commlib.bootstrap.agreement import allgather_or_raise
from commlib.errors import CommTimeout, PeerLostError, TransportError

__all__ = ["HostPage"]

_WORDS_PER_RANK = 8  # a cache line of 64-bit words
_CHECK_S = 0.1


class HostPage:
    """One line per rank, written by that rank alone, for the ranks of a node. Construction is collective among all.

    Args:
        boot: the ranks.
        node_ranks: those of this rank's node, ascending.
        timeout_s: seconds within which all ranks must come.

    Raises:
        TransportError: a rank's page cannot be opened: the ranks do not share a PID namespace and a user.
    """

    def __init__(self, boot: Bootstrap, node_ranks: Sequence[int], timeout_s: float) -> None:
        self.rank, self.num_ranks, self._node_ranks = boot.rank, boot.size, list(node_ranks)
        self._descriptor = -1
        told = [json.loads(blob) for blob in allgather_or_raise(boot, self._create, timeout_s=timeout_s)]
        self._pidfds: dict[int, int] = {}
        self._next_check = 0.0
        allgather_or_raise(boot, lambda: self._open(told), timeout_s=timeout_s)
        if self._descriptor >= 0:  # all have it mapped
            os.close(self._descriptor)

    def _create(self) -> bytes:
        if self.rank == self._node_ranks[0]:
            self._descriptor = os.memfd_create("commlib-page")
            os.ftruncate(self._descriptor, self.num_ranks * _WORDS_PER_RANK * 8)
        return json.dumps({"pid": os.getpid(), "descriptor": self._descriptor}).encode()

    def _open(self, told: list[dict[str, int]]) -> bytes:
        first = told[self._node_ranks[0]]
        path = f"/proc/{first['pid']}/fd/{first['descriptor']}"
        try:
            descriptor = os.open(path, os.O_RDWR)
            self._memory = mmap.mmap(descriptor, self.num_ranks * _WORDS_PER_RANK * 8)
            os.close(descriptor)
            for rank in self._node_ranks:
                if rank != self.rank:
                    self._pidfds[rank] = os.pidfd_open(told[rank]["pid"])
        except OSError as error:
            raise TransportError(
                f"rank {self.rank} cannot reach the other ranks' processes ({path}: {error}); ranks of a node share a "
                "PID namespace and a user",
                call="open",
                code=error.errno or 0,
            ) from error
        self._words = np.frombuffer(self._memory, dtype=np.int64).reshape(self.num_ranks, _WORDS_PER_RANK)
        self._poll = select.poll()
        for pidfd in self._pidfds.values():
            self._poll.register(pidfd, select.POLLIN)
        return b""

    def lost_peer(self) -> int | None:
        """A rank whose process has ended; looks at most ten times a second."""
        now = time.monotonic()
        if now < self._next_check:
            return None
        self._next_check = now + _CHECK_S
        ended = {pidfd for pidfd, _ in self._poll.poll(0)}
        return next((rank for rank, pidfd in self._pidfds.items() if pidfd in ended), None)

    def retire(self, count: int) -> None:
        """This rank maps none of the first `count` segments of any peer any more."""
        self._words[self.rank, 0] = count

    def wait_retired(self, count: int, timeout_s: float) -> None:
        """Returns when no rank maps the first `count` segments.

        Raises:
            CommTimeout: a rank still does.
            PeerLostError: a rank that still does has ended.
        """
        limit = time.monotonic() + timeout_s
        ranks = np.array(self._node_ranks)
        while (behind := ranks[self._words[ranks, 0] < count]).size:
            if time.monotonic() > limit:
                peer = int(behind[0])
                raise CommTimeout(
                    f"rank {self.rank} waited {timeout_s:g} s for rank {peer} to unmap its memory",
                    rank=self.rank, peer=peer, channel=f"{peer} -> {self.rank}", phase="unmap", tag=count,
                    expected=count, seen=int(self._words[peer, 0]),
                )  # fmt: skip
            if (lost := self.lost_peer()) is not None and lost in behind:
                raise PeerLostError(
                    f"rank {lost} is lost: its process has ended", rank=self.rank, peer=lost,
                    channel=f"{lost} -> {self.rank}", phase="unmap",
                )  # fmt: skip
            time.sleep(0.0002)

    def close(self) -> None:
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._pidfds.clear()
