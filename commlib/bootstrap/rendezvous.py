"""The ZeroMQ bootstrap: ranks meet at rank 0's TCP address and know each other by the job token."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import threading

import zmq

from commlib.bootstrap import wire
from commlib.bootstrap.interface import Deadline, check_payload, check_usable, missing_ranks, no_answer
from commlib.bootstrap.selection import TOKEN_HINT
from commlib.bootstrap.server import Endpoint, RendezvousServer, acquire_server
from commlib.bootstrap.wire import Kind, Refusal
from commlib.errors import CommError, ConfigError

__all__ = ["RendezvousBootstrap", "parse_endpoint"]

logger = logging.getLogger("commlib.bootstrap")

# Rank 0 keeps the clock of a round; this is how long its verdict may take to reach a rank that has met it.
_VERDICT_GRACE_S = 2.0
# HELLO is said again until somebody answers: the first may have reached a server that was just ending.
_HELLO_INTERVAL_S = 1.0
_BYE_LINGER_MS = 200

_ENDPOINT = re.compile(r"tcp://(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5})")

_REFUSALS = {
    Refusal.BAD_MESSAGE: "it did not understand this rank; do all ranks run the same commlib?",
    Refusal.BAD_TOKEN: "COMMLIB_JOB_TOKEN differs from rank 0's",
    Refusal.WRONG_SIZE: "COMMLIB_WORLD_SIZE differs from rank 0's",
    Refusal.BAD_RANK: "the rank is not below the world size",
    Refusal.DUPLICATE_RANK: "another process of the job has this rank already",
    Refusal.OUT_OF_STEP: "this rank's calls are not those of the other ranks",
}

_next_instances: dict[tuple[Endpoint, bytes, int], int] = {}
_next_instances_lock = threading.Lock()


def parse_endpoint(text: str) -> Endpoint:
    """Takes apart ``tcp://host:port``. Raises `ConfigError` if it is not one, or the port is not in 1..65535."""
    match = _ENDPOINT.fullmatch(text)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise ConfigError(f"rendezvous {text!r} is not tcp://host:port with port in 1..65535")
    host = match[1].strip("[]")
    # ZeroMQ binds numbers and interface names, and the name would resolve to ::1 on some hosts.
    return Endpoint("127.0.0.1" if host == "localhost" else host, int(match[2]))


def _take_instance(endpoint: Endpoint, token: str, rank: int) -> int:
    """The number of this `connect` among those of the rank: equal on all ranks, which open Runtimes in one order."""
    key = (endpoint, hashlib.sha256(token.encode()).digest(), rank)
    with _next_instances_lock:
        number = _next_instances.get(key, 0)
        _next_instances[key] = number + 1
    return number


class RendezvousBootstrap:
    """A job of processes that know `endpoint` and `token`. Implements `Bootstrap`.

    Args:
        endpoint: ``tcp://host:port``, an address of rank 0's machine. Rank 0 listens on that address if it is numeric
            or ``localhost``, on all addresses of its machine if it is another name.
        token: secret of the job, equal on all ranks; never sent.
        rank: this rank, in ``0..size-1``.
        size: number of ranks.
        timeout_s: seconds within which all ranks must have come.

    Raises:
        CommTimeout: names the ranks that did not come, or rank 0 if it did not answer.
        ConfigError: the endpoint cannot be used, or rank 0 refused this rank; says why.
    """

    def __init__(self, *, endpoint: str, token: str, rank: int, size: int, timeout_s: float) -> None:
        if not token:
            raise ConfigError(f"a rendezvous needs a job token; {TOKEN_HINT}")
        if not 0 <= rank < size <= wire.MAX_RANKS:
            raise ConfigError(f"rank={rank}, size={size} break 0 <= rank < size <= {wire.MAX_RANKS}")
        deadline = Deadline(timeout_s)
        self.rank = rank
        self.size = size
        self._endpoint = parse_endpoint(endpoint)
        self._token = token
        self._instance = _take_instance(self._endpoint, token, rank)
        self._round = 0
        self._has_joined = False
        self._failure: str | None = None
        self._is_closed = False
        self._server: RendezvousServer | None = None
        if rank == 0:
            self._server = acquire_server(self._endpoint, token, size)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        try:
            self._open()
            self._join(deadline)
            self._gather(b"", deadline)
        except BaseException:
            self.close()
            raise

    def allgather(self, payload: bytes, *, timeout_s: float) -> list[bytes]:
        """See `Bootstrap.allgather`."""
        check_usable(self._is_closed, self._failure)
        check_payload(payload)
        return self._gather(payload, Deadline(timeout_s))

    def barrier(self, timeout_s: float) -> None:
        """See `Bootstrap.barrier`."""
        self.allgather(b"", timeout_s=timeout_s)

    def close(self) -> None:
        """See `Bootstrap.close`."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._server is not None:
            self._server.release()
        try:
            self._socket.send(wire.pack(Kind.BYE, self._instance), zmq.NOBLOCK)
        except zmq.ZMQError:
            logger.debug("rank %d of %s could not say goodbye", self.rank, self._endpoint)
        self._socket.close(linger=_BYE_LINGER_MS if self._has_joined else 0)
        self._context.term()

    def describe(self) -> str:
        """See `Bootstrap.describe`."""
        return f"ZeroMQ rendezvous {self._endpoint} (instance {self._instance}), rank {self.rank} of {self.size}"

    def _open(self) -> None:
        self._socket.linger = 0
        self._socket.ipv6 = self._endpoint.is_ipv6
        self._socket.sndtimeo = 0  # every send has room; if not, raise rather than wait
        self._socket.reconnect_ivl = 50
        try:
            self._socket.connect(str(self._endpoint))
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot connect to {self._endpoint}: {error.strerror}") from error

    def _receive(self, wait_s: float) -> wire.Message | None:
        """The next message of this instance, or None if there was none in time."""
        deadline = Deadline(wait_s)
        while self._socket.poll(int(deadline.remaining_s() * 1e3) + 1):
            try:
                message = wire.unpack(self._socket.recv_multipart(zmq.NOBLOCK))
            except wire.WireError as error:
                logger.warning("ignored a foreign message from %s: %s", self._endpoint, error)
                continue
            if message.kind is Kind.REFUSED or message.instance == self._instance:
                return message
        return None

    def _join(self, deadline: Deadline) -> None:
        """Proves to rank 0 that this rank knows the token, and checks that rank 0 does."""
        nonce = secrets.token_bytes(wire.NONCE_BYTES)
        server_nonce: bytes | None = None
        while not deadline.has_passed():
            if server_nonce is None:
                self._socket.send(wire.pack(Kind.HELLO, self._instance, self.rank, self.size, nonce))
            message = self._receive(min(_HELLO_INTERVAL_S, deadline.remaining_s()))
            if message is None:
                continue
            if message.kind is Kind.REFUSED:
                raise self._refused(message)
            if message.kind is Kind.CHALLENGE and message.fields[0] == nonce and server_nonce is None:
                server_nonce = message.fields[1]
                self._socket.send(wire.pack(Kind.PROOF, self._instance, self._proof("client", nonce, server_nonce)))
            elif message.kind is Kind.WELCOME and server_nonce is not None:
                if not hmac.compare_digest(message.fields[0], self._proof("server", nonce, server_nonce)):
                    raise ConfigError(f"the process at {self._endpoint} does not know the job token: it is not rank 0")
                self._has_joined = True
                return
        raise self._no_answer(deadline)

    def _proof(self, role: str, client_nonce: bytes, server_nonce: bytes) -> bytes:
        return wire.proof(
            self._token,
            role,
            instance=self._instance,
            rank=self.rank,
            size=self.size,
            client_nonce=client_nonce,
            server_nonce=server_nonce,
        )

    def _gather(self, payload: bytes, deadline: Deadline) -> list[bytes]:
        try:
            header = wire.pack(Kind.GATHER, self._instance, self._round, deadline.remaining_s())
            self._socket.send_multipart([header, payload])
            result = self._await_result(deadline)
        except (CommError, zmq.ZMQError) as error:
            self._failure = str(error)
            raise
        self._round += 1
        return result

    def _await_result(self, deadline: Deadline) -> list[bytes]:
        verdict_deadline = Deadline(deadline.remaining_s() + _VERDICT_GRACE_S)
        while (message := self._receive(verdict_deadline.remaining_s())) is not None:
            if message.kind is Kind.REFUSED:
                raise self._refused(message)
            if message.kind is Kind.MISSING and len(message.frames) == 1:
                missing = wire.unpack_ranks(message.frames[0])
                raise missing_ranks(
                    "rendezvous",
                    missing,
                    rank=self.rank,
                    size=self.size,
                    seen=self.size - len(missing),
                    waited_s=message.fields[0],
                    tag=self._round,
                )
            if message.kind is Kind.RESULT and message.fields[0] == self._round and len(message.frames) == self.size:
                return list(message.frames)
        raise self._no_answer(deadline)

    def _no_answer(self, deadline: Deadline) -> CommError:
        self._failure = "rank 0 did not answer"
        return no_answer(
            "rendezvous",
            rank=self.rank,
            size=self.size,
            waited_s=deadline.timeout_s,
            tag=self._round,
            where=str(self._endpoint),
        )

    def _refused(self, message: wire.Message) -> ConfigError:
        code = message.fields[0]
        why = _REFUSALS[Refusal(code)] if code in set(Refusal) else f"reason {code}"
        self._failure = why
        return ConfigError(f"rank 0 at {self._endpoint} refused rank {self.rank} of {self.size}: {why}")
