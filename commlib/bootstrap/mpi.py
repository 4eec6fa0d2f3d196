"""The bootstrap over an MPI communicator.

MPI collectives neither end at a deadline nor say who is missing, so the gather is made of point-to-point messages to
rank 0, which polls until its deadline and sends everybody the payloads or the list of missing ranks. All of it runs
over a duplicate of the caller's communicator; only the roll call before the duplication (itself a collective) has to
use the original: a few short messages between rank 0 and every other rank, under a tag of their own.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

from mpi4py import MPI

from commlib.bootstrap.interface import Deadline, check_payload, check_usable, missing_ranks, no_answer
from commlib.errors import CommError, CommTimeout, ConfigError

__all__ = ["MpiBootstrap"]

logger = logging.getLogger("commlib.bootstrap")

# Below the smallest MPI_TAG_UB that the standard allows, and unlikely to be the caller's.
_TAG = 31921
# Rank 0 keeps the clock; this is how long its answer may take.
_ANSWER_GRACE_S = 2.0
_MAX_SLEEP_S = 0.002

_HEADER = struct.Struct("<IQdd")  # kind, round, seconds left to the sender, seconds it has in all
_LENGTH = struct.Struct("<Q")
_RANK = struct.Struct("<I")


class _Kind(IntEnum):
    HELLO = 1
    PAYLOAD = 2
    RESULT = 3
    MISSING = 4


class _Message(NamedTuple):
    source: int
    kind: _Kind
    remaining_s: float
    timeout_s: float
    body: bytes


# Counts the roll calls of a communicator, so that a message left by one that failed cannot be taken for the next one's.
_roll_call_key: int | None = None


class MpiBootstrap:
    """Ranks of an MPI intracommunicator. Implements `Bootstrap`.

    Args:
        comm: the communicator; stays the caller's.
        timeout_s: seconds within which all its ranks must construct theirs.

    The deadline covers ranks that have initialised MPI: MPI_Init itself is a collective that nothing can interrupt.

    Raises:
        CommTimeout: names the ranks that did not come, or rank 0 if it did not answer.
        ConfigError: `comm` is null or an intercommunicator, or MPI is not running.
    """

    def __init__(self, comm: MPI.Comm, *, timeout_s: float) -> None:
        if not MPI.Is_initialized() or MPI.Is_finalized():
            raise ConfigError("MPI is not running in this process: call MPI.Init before, and MPI.Finalize after")
        if comm == MPI.COMM_NULL:
            raise ConfigError("this process is not in the communicator (it is MPI.COMM_NULL)")
        if not isinstance(comm, MPI.Intracomm):
            raise ConfigError(f"{type(comm).__name__} is not an intracommunicator; Merge() makes one of it")
        deadline = Deadline(timeout_s)
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self._name = comm.Get_name() or "communicator"
        self._round = 0
        self._failure: str | None = None
        self._is_closed = False
        _Gather(comm, _count_roll_call(comm), deadline).run(b"")
        self._comm = _duplicate(comm, deadline)

    def allgather(self, payload: bytes, *, timeout_s: float) -> list[bytes]:
        """See `Bootstrap.allgather`."""
        check_usable(self._is_closed, self._failure)
        check_payload(payload)
        try:
            result = _Gather(self._comm, self._round, Deadline(timeout_s)).run(payload)
        except (CommError, MPI.Exception) as error:
            self._failure = str(error)
            raise
        self._round += 1
        return result

    def barrier(self, timeout_s: float) -> None:
        """See `Bootstrap.barrier`."""
        self.allgather(b"", timeout_s=timeout_s)

    def close(self) -> None:
        """See `Bootstrap.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        # Freeing may wait for messages that a failed round left behind, so the duplicate is leaked then.
        if self._failure is None and not MPI.Is_finalized():
            self._comm.Free()

    def describe(self) -> str:
        """See `Bootstrap.describe`."""
        return f"MPI {self._name} ({MPI.get_vendor()[0]}), rank {self.rank} of {self.size}"


class _Gather:
    """One round of `allgather` over a communicator."""

    def __init__(self, comm: MPI.Intracomm, round_number: int, deadline: Deadline) -> None:
        self._comm = comm
        self._rank: int = comm.Get_rank()
        self._size: int = comm.Get_size()
        self._round = round_number
        self._deadline = deadline

    def run(self, payload: bytes) -> list[bytes]:
        return self._collect(payload) if self._rank == 0 else self._contribute(payload)

    def _collect(self, payload: bytes) -> list[bytes]:
        """Rank 0: waits for all payloads and answers those who sent one."""
        deadline = self._deadline
        arrived = {0: payload}
        while len(arrived) < self._size:
            message = self._receive(MPI.ANY_SOURCE, deadline)
            if message is None:
                break
            if message.kind is _Kind.PAYLOAD:
                arrived[message.source] = message.body
                # The verdict has to reach the rank with the least time left.
                if message.remaining_s < deadline.remaining_s():
                    deadline = Deadline(message.remaining_s, reported_s=message.timeout_s)
        missing = sorted(set(range(self._size)) - arrived.keys())
        if missing:
            self._deadline = deadline
            self._send(list(arrived)[1:], _Kind.MISSING, b"".join(map(_RANK.pack, missing)))
            raise self._missing(missing, deadline.timeout_s)
        payloads = [arrived[rank] for rank in range(self._size)]
        self._send(range(1, self._size), _Kind.RESULT, b"".join(_LENGTH.pack(len(p)) + p for p in payloads))
        return payloads

    def _contribute(self, payload: bytes) -> list[bytes]:
        """Other ranks: send the payload and wait for rank 0's verdict."""
        # A synchronous send ends when rank 0 has come; only then does "seconds left" mean the same to both.
        self._send([0], _Kind.HELLO, b"", is_synchronous=True)
        self._send([0], _Kind.PAYLOAD, payload)
        message = self._receive(0, Deadline(self._deadline.remaining_s() + _ANSWER_GRACE_S))
        if message is None:
            raise self._no_answer()
        if message.kind is _Kind.MISSING:
            raise self._missing([rank for (rank,) in _RANK.iter_unpack(message.body)], message.timeout_s)
        payloads = []
        offset = 0
        while offset < len(message.body):
            (length,) = _LENGTH.unpack_from(message.body, offset)
            offset += _LENGTH.size
            payloads.append(message.body[offset : offset + length])
            offset += length
        assert len(payloads) == self._size, f"{len(payloads)} payloads for {self._size} ranks"
        return payloads

    def _send(self, ranks: Sequence[int], kind: _Kind, body: bytes, *, is_synchronous: bool = False) -> None:
        message = _HEADER.pack(kind, self._round, self._deadline.remaining_s(), self._deadline.timeout_s) + body
        start = self._comm.Issend if is_synchronous else self._comm.Isend
        pending = {rank: start([message, MPI.BYTE], dest=rank, tag=_TAG) for rank in ranks}

        def is_sent() -> bool:
            for rank in [rank for rank, request in pending.items() if request.Test()]:
                del pending[rank]
            return not pending

        deadline = Deadline(self._deadline.remaining_s() + (0 if is_synchronous else _ANSWER_GRACE_S))
        if not _poll(is_sent, deadline):
            raise self._no_answer() if self._rank else self._missing(sorted(pending), deadline.timeout_s)

    def _receive(self, source: int, deadline: Deadline) -> _Message | None:
        """The next message of this round, or None if there was none in time."""
        status = MPI.Status()
        while True:
            found: MPI.Message | None = None

            def is_found() -> bool:
                nonlocal found
                found = self._comm.Improbe(source=source, tag=_TAG, status=status)
                return found is not None

            if not _poll(is_found, deadline):
                return None
            assert found is not None
            buffer = bytearray(status.Get_count(MPI.BYTE))
            sender = status.Get_source()
            if not _poll(found.Irecv([buffer, MPI.BYTE]).Test, deadline):
                return None
            kind, round_number, remaining_s, timeout_s = _HEADER.unpack_from(buffer)
            if round_number == self._round:
                return _Message(sender, _Kind(kind), remaining_s, timeout_s, bytes(buffer[_HEADER.size :]))
            logger.warning("dropped a message of round %d in round %d", round_number, self._round)

    def _missing(self, missing: Sequence[int], waited_s: float) -> CommTimeout:
        seen = self._size - len(missing)
        return missing_ranks(
            "MPI", missing, rank=self._rank, size=self._size, seen=seen, waited_s=waited_s, tag=self._round
        )

    def _no_answer(self) -> CommTimeout:
        waited_s = self._deadline.timeout_s
        return no_answer("MPI", rank=self._rank, size=self._size, waited_s=waited_s, tag=self._round)


def _poll(is_done: Callable[[], bool], deadline: Deadline) -> bool:
    """Calls `is_done` until it is true (returns True) or the deadline has passed (returns False)."""
    sleep_s = 0.0
    while not is_done():
        if deadline.has_passed():
            return False
        # Ranks often share cores: give the others a chance rather than spin.
        time.sleep(sleep_s)
        sleep_s = min(_MAX_SLEEP_S, sleep_s + 1e-5)
    return True


def _count_roll_call(comm: MPI.Intracomm) -> int:
    global _roll_call_key
    if _roll_call_key is None:
        _roll_call_key = MPI.Comm.Create_keyval()
    count = comm.Get_attr(_roll_call_key) or 0
    comm.Set_attr(_roll_call_key, count + 1)
    return int(count)


def _duplicate(comm: MPI.Intracomm, deadline: Deadline) -> MPI.Intracomm:
    """A private communicator of the same ranks; all of them are known to be here."""
    duplicate, request = comm.Idup()
    grace = Deadline(deadline.remaining_s() + _ANSWER_GRACE_S)
    if not _poll(request.Test, grace):
        raise CommTimeout(
            f"MPI: all {comm.Get_size()} ranks arrived, but MPI_Comm_idup did not end within {grace.timeout_s:.3g} s",
            rank=comm.Get_rank(),
            peer=None,
            channel="bootstrap",
            phase="duplicate",
            tag=0,
            expected=1,
            seen=0,
        )
    assert isinstance(duplicate, MPI.Intracomm)
    return duplicate
