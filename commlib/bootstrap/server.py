"""Rank 0's side of the ZeroMQ rendezvous: one thread that keeps the roll for every Runtime of the job.

A process has at most one server per endpoint. It serves any number of instances (the n-th `connect` of every rank meets
in instance n), sleeps while nothing is due, and ends by itself once every rank has left; at process exit at the latest.
"""

from __future__ import annotations

import atexit
import errno
import hmac
import logging
import math
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import zmq

from commlib.bootstrap import wire
from commlib.bootstrap.interface import MAX_PAYLOAD_BYTES, Deadline
from commlib.bootstrap.wire import Kind, Refusal
from commlib.errors import ConfigError

__all__ = ["Endpoint", "RendezvousServer", "acquire_server"]

logger = logging.getLogger("commlib.bootstrap")

# Replies still queued when the server ends are handed to the kernel within this time, then dropped.
_LINGER_MS = 1000
# A challenge that nobody answers is forgotten: strays must neither pile up nor keep the server alive.
_CHALLENGE_LIFE_S = 5.0
_MAX_CHALLENGES = 4096
_MAX_LOGGED_REFUSALS = 100
_BIND_RETRY_S = 2.0
_MAX_WAIT_S = 1e6


class Endpoint(NamedTuple):
    """A TCP address; `host` is without the brackets of IPv6."""

    host: str
    port: int

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.host

    @property
    def is_numeric(self) -> bool:
        return self.is_ipv6 or self.host.replace(".", "").isdigit()

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if self.is_ipv6 else f"tcp://{self.host}:{self.port}"


class _Challenge(NamedTuple):
    rank: int
    size: int
    instance: int
    client_nonce: bytes
    server_nonce: bytes
    expires_at: float


@dataclass
class _Instance:
    """One bootstrap of the job: who has joined and left, and the round of `allgather` in progress."""

    size: int
    members: dict[int, bytes] = field(default_factory=dict)  # rank -> ZeroMQ identity
    left: set[int] = field(default_factory=set)
    round: int = 0
    arrived: dict[int, bytes] = field(default_factory=dict)  # rank -> payload
    started_at: float = math.inf
    expires_at: float = math.inf
    verdict: tuple[float, list[int]] | None = None  # seconds waited and missing ranks, once it has failed

    @property
    def is_done(self) -> bool:
        # A rank that is late for a job that has failed should hear so at once, so the server waits for it as well.
        return len(self.left) == self.size

    def start_next_round(self) -> None:
        self.round += 1
        self.arrived = {}
        self.started_at = self.expires_at = math.inf


_servers: dict[Endpoint, RendezvousServer] = {}
_servers_lock = threading.Lock()


def acquire_server(endpoint: Endpoint, token: str, size: int) -> RendezvousServer:
    """This process's server at the endpoint, started if there is none; give it back with `release`.

    Raises:
        ConfigError: the address cannot be bound, or a job with another token or size is still open there.
    """
    while True:
        with _servers_lock:
            server = _servers.get(endpoint)
            if server is None:
                server = _servers[endpoint] = RendezvousServer(endpoint, token, size)
            if server.serves(token, size):
                server.num_users += 1
                return server
            if server.num_users > 0:
                raise ConfigError(f"{endpoint} serves another job of this process (other token or world size)")
            del _servers[endpoint]
        server.stop()  # a job whose last ranks died without leaving


@atexit.register
def _stop_all() -> None:
    # A daemon thread dies without flushing; replies that other ranks still wait for must leave first.
    with _servers_lock:
        servers = list(_servers.values())
        _servers.clear()
    for server in servers:
        server.stop()


class RendezvousServer:
    """A ROUTER socket and the daemon thread that owns it.

    Peers are admitted by a challenge: they prove knowledge of the job token without sending it, and get a proof in
    return. Anything else is refused and logged, and touches no state that members use.
    """

    def __init__(self, endpoint: Endpoint, token: str, size: int) -> None:
        self.endpoint = endpoint
        self.num_users = 0  # bootstraps of this process; guarded by _servers_lock
        self._token = token
        self._size = size
        self._instances: dict[int, _Instance] = {}
        self._members: dict[bytes, tuple[int, int]] = {}  # ZeroMQ identity -> instance, rank
        self._challenges: dict[bytes, _Challenge] = {}
        self._num_refusals = 0
        self._handling = threading.Lock()  # held while a message is answered
        self._context = zmq.Context()
        self._socket = self._bind()
        self._thread = threading.Thread(target=self._serve, name="commlib-rendezvous", daemon=True)
        self._thread.start()

    def serves(self, token: str, size: int) -> bool:
        """Whether this is the server of the job with that token and number of ranks."""
        return hmac.compare_digest(token.encode(), self._token.encode()) and size == self._size

    def release(self) -> None:
        """Gives up the caller's share. The thread notices at the next message, which is the caller's BYE."""
        with _servers_lock:
            self.num_users -= 1

    def stop(self) -> None:
        """Ends the thread, within the linger time. Whoever took the server out of `_servers` calls it, without lock."""
        with self._handling:  # rank 0 has its answer, the others' may not have been sent yet
            pass
        self._context.term()  # wakes the thread, returns when it has closed its socket
        self._thread.join(_LINGER_MS / 1e3)

    def _bind(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.linger = _LINGER_MS
        socket.ipv6 = self.endpoint.is_ipv6
        socket.sndhwm = 0  # a ROUTER drops messages at its high-water mark, it does not wait
        socket.maxmsgsize = MAX_PAYLOAD_BYTES
        # A name often resolves to loopback on its own host, where other nodes could not reach it.
        address = str(self.endpoint) if self.endpoint.is_numeric else f"tcp://*:{self.endpoint.port}"
        deadline = Deadline(_BIND_RETRY_S)
        while True:
            try:
                socket.bind(address)
                return socket
            except zmq.ZMQError as error:
                # The server of the previous job in this process, or that process, may be closing the port right now.
                if error.errno != errno.EADDRINUSE or deadline.has_passed():
                    self._context.destroy(linger=0)
                    raise ConfigError(
                        f"rank 0 cannot listen at {address}: {error.strerror}; is another process rank 0 of this job,"
                        " or does COMMLIB_RENDEZVOUS name another machine or a taken port?"
                    ) from error
            time.sleep(0.05)

    def _serve(self) -> None:
        try:
            while not self._retire():
                is_there = self._socket.poll(self._poll_ms())
                with self._handling:
                    if is_there:
                        self._receive()
                    self._expire()
        except zmq.ContextTerminated:
            logger.debug("%s: stopped", self.endpoint)
        finally:
            # Without this, an error of ours in the thread would make `stop` wait for the socket for ever.
            self._socket.close()

    def _retire(self) -> bool:
        """Ends the server if nobody can need it any more."""
        with _servers_lock:
            if self.num_users > 0 or self._challenges or not all(i.is_done for i in self._instances.values()):
                return False
            if _servers.get(self.endpoint) is not self:
                return False  # somebody is in `stop`
            del _servers[self.endpoint]
        self._socket.close()
        self._context.term()
        return True

    def _poll_ms(self) -> int | None:
        moments = [challenge.expires_at for challenge in self._challenges.values()]
        moments += [instance.expires_at for instance in self._instances.values()]
        next_moment = min(moments, default=math.inf)
        if next_moment == math.inf:
            return None
        return max(0, math.ceil((next_moment - time.monotonic()) * 1e3))

    def _receive(self) -> None:
        frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        identity = frames[0].bytes
        try:
            peer = str(frames[0].get("Peer-Address"))
        except zmq.ZMQError:
            peer = "unknown address"
        try:
            self._handle(identity, peer, wire.unpack([frame.bytes for frame in frames[1:]]))
        except wire.WireError as error:
            self._refuse(identity, peer, Refusal.BAD_MESSAGE, 0, str(error))

    def _handle(self, identity: bytes, peer: str, message: wire.Message) -> None:
        if message.kind is Kind.HELLO:
            self._challenge(identity, message)
        elif message.kind is Kind.PROOF:
            self._admit(identity, peer, message)
        elif message.kind is Kind.GATHER:
            self._gather(identity, peer, message)
        elif message.kind is Kind.BYE:
            # From a peer that was refused or has left, it says nothing new.
            member = self._members.pop(identity, None)
            if member is not None:
                self._instances[member[0]].left.add(member[1])
        else:
            raise wire.WireError(f"{message.kind.name} is not for a server")

    def _challenge(self, identity: bytes, message: wire.Message) -> None:
        if identity in self._members:
            return  # said again while our answer was on its way
        rank, size, client_nonce = message.fields
        known = self._challenges.get(identity)
        if known is not None and known.client_nonce == client_nonce:
            server_nonce = known.server_nonce
        else:
            server_nonce = secrets.token_bytes(wire.NONCE_BYTES)
        while len(self._challenges) >= _MAX_CHALLENGES:
            del self._challenges[next(iter(self._challenges))]
        self._challenges[identity] = _Challenge(
            rank, size, message.instance, client_nonce, server_nonce, time.monotonic() + _CHALLENGE_LIFE_S
        )
        self._send(identity, wire.pack(Kind.CHALLENGE, message.instance, client_nonce, server_nonce))

    def _admit(self, identity: bytes, peer: str, message: wire.Message) -> None:
        challenge = self._challenges.pop(identity, None)
        if challenge is None:
            self._refuse(identity, peer, Refusal.BAD_MESSAGE, message.instance, "a proof without a challenge")
            return
        rank, size, number, client_nonce, server_nonce, _ = challenge

        def expected(role: str) -> bytes:
            return wire.proof(
                self._token,
                role,
                instance=number,
                rank=rank,
                size=size,
                client_nonce=client_nonce,
                server_nonce=server_nonce,
            )

        if message.instance != number or not hmac.compare_digest(message.fields[0], expected("client")):
            self._refuse(identity, peer, Refusal.BAD_TOKEN, number, "it does not know the job token")
        elif size != self._size:
            self._refuse(identity, peer, Refusal.WRONG_SIZE, number, f"world size {size} is not {self._size}")
        elif rank >= self._size:
            self._refuse(identity, peer, Refusal.BAD_RANK, number, f"rank {rank} is not in 0..{self._size - 1}")
        elif number in self._instances and rank in self._instances[number].members:
            self._refuse(identity, peer, Refusal.DUPLICATE_RANK, number, f"rank {rank} has joined already")
        else:
            self._instances.setdefault(number, _Instance(self._size)).members[rank] = identity
            self._members[identity] = (number, rank)
            self._send(identity, wire.pack(Kind.WELCOME, number, expected("server")))

    def _gather(self, identity: bytes, peer: str, message: wire.Message) -> None:
        number, rank = self._members.get(identity, (-1, -1))
        round_number, wait_s = message.fields
        if message.instance != number or len(message.frames) != 1 or not 0 <= wait_s <= _MAX_WAIT_S:
            self._refuse(identity, peer, Refusal.BAD_MESSAGE, message.instance, "not a valid call of a member")
            return
        instance = self._instances[number]
        if instance.verdict is not None:
            self._send_verdict(number, instance, [identity])
            return
        if round_number != instance.round or rank in instance.arrived:
            why = f"rank {rank} is in round {round_number}, the job in {instance.round}"
            self._refuse(identity, peer, Refusal.OUT_OF_STEP, number, why)
            return
        now = time.monotonic()
        instance.arrived[rank] = message.frames[0]
        instance.started_at = min(instance.started_at, now)
        instance.expires_at = min(instance.expires_at, now + wait_s)
        if len(instance.arrived) == instance.size:
            payloads = [instance.arrived[source] for source in range(instance.size)]
            for member in instance.members.values():
                self._send(member, wire.pack(Kind.RESULT, number, round_number), *payloads)
            instance.start_next_round()

    def _expire(self) -> None:
        now = time.monotonic()
        for identity in [i for i, challenge in self._challenges.items() if challenge.expires_at <= now]:
            logger.warning("%s: a peer said hello and never answered the challenge", self.endpoint)
            del self._challenges[identity]
        for number, instance in self._instances.items():
            if instance.expires_at <= now:
                missing = sorted(set(range(instance.size)) - instance.arrived.keys())
                instance.verdict = (now - instance.started_at, missing)
                self._send_verdict(number, instance, [instance.members[rank] for rank in instance.arrived])
                instance.start_next_round()

    def _send_verdict(self, number: int, instance: _Instance, identities: Sequence[bytes]) -> None:
        assert instance.verdict is not None
        waited_s, missing = instance.verdict
        for identity in identities:
            header = wire.pack(Kind.MISSING, number, waited_s)
            self._send(identity, header, wire.pack_ranks(missing))

    def _refuse(self, identity: bytes, peer: str, reason: Refusal, number: int, why: str) -> None:
        self._num_refusals += 1
        if self._num_refusals <= _MAX_LOGGED_REFUSALS:
            logger.warning("%s: refused a peer from %s: %s", self.endpoint, peer, why)
        if self._num_refusals == _MAX_LOGGED_REFUSALS:
            logger.warning("%s: further refusals are not logged", self.endpoint)
        self._send(identity, wire.pack(Kind.REFUSED, number, reason))

    def _send(self, identity: bytes, *frames: bytes) -> None:
        try:
            self._socket.send_multipart([identity, *frames], zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("%s: dropped a reply to a peer that does not read", self.endpoint)
