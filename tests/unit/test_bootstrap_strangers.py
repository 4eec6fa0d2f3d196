"""The ZeroMQ rendezvous among strangers: refused, logged, and no disturbance to the job."""

from __future__ import annotations

import ast
import hmac
import logging
import os
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import zmq
from bootstrap_job import TOKEN, Job, close_all, new_job, wait_for

import commlib.bootstrap
from commlib.bootstrap import server, wire
from commlib.bootstrap.rendezvous import RendezvousBootstrap, parse_endpoint
from commlib.bootstrap.wire import Kind, Refusal
from commlib.errors import CommTimeout, ConfigError

PACKAGE = Path(commlib.bootstrap.__file__).parent


@pytest.fixture
def job() -> Iterator[Job]:
    with new_job() as each:
        yield each


class Stranger:
    """A peer that speaks ZeroMQ, and of the protocol as much as a test wants."""

    def __init__(self, endpoint: str, kind: int = zmq.DEALER) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(kind)
        self.socket.linger = 0
        self.socket.connect(endpoint)

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)

    def ask(self, *frames: bytes) -> wire.Message:
        self.socket.send_multipart(frames)
        assert self.socket.poll(5000), "no reply"
        return wire.unpack(self.socket.recv_multipart())

    def shake_hands(self, *, rank: int, size: int, token: str = TOKEN, role: str = "client") -> wire.Message:
        nonce = b"n" * wire.NONCE_BYTES
        challenge = self.ask(wire.pack(Kind.HELLO, 0, rank, size, nonce))
        assert challenge.kind is Kind.CHALLENGE
        answer = wire.proof(
            token, role, instance=0, rank=rank, size=size, client_nonce=nonce, server_nonce=challenge.fields[1]
        )
        return self.ask(wire.pack(Kind.PROOF, 0, answer))


class Bomb:
    """Unpickling it would leave a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def refusal(message: wire.Message) -> Refusal:
    assert message.kind is Kind.REFUSED
    return Refusal(message.fields[0])


def send_raw(endpoint: str, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", parse_endpoint(endpoint).port), timeout=5) as connection:
        connection.sendall(data)
        time.sleep(0.1)


HEADER = wire.pack(Kind.BYE, 0)
HANDSHAKES: dict[str, tuple[dict[str, Any], Refusal, str]] = {
    "wrong token": ({"rank": 1, "size": 2, "token": "guess"}, Refusal.BAD_TOKEN, "does not know the job token"),
    "empty token": ({"rank": 1, "size": 2, "token": ""}, Refusal.BAD_TOKEN, "does not know the job token"),
    "proof of the server": ({"rank": 1, "size": 2, "role": "server"}, Refusal.BAD_TOKEN, "does not know the job token"),
    "wrong world size": ({"rank": 1, "size": 3}, Refusal.WRONG_SIZE, "world size 3 is not 2"),
    "rank out of range": ({"rank": 2, "size": 2}, Refusal.BAD_RANK, r"rank 2 is not in 0\.\.1"),
    "duplicate rank": ({"rank": 0, "size": 2}, Refusal.DUPLICATE_RANK, "rank 0 has joined already"),
}
MESSAGES: dict[str, tuple[list[bytes], str]] = {
    "bad magic": ([b"EVIL" + HEADER[4:]], "magic b'EVIL'"),
    "other version": ([HEADER[:4] + b"\x63" + HEADER[5:]], "protocol version 99 is not 1"),
    "unknown kind": ([HEADER[:5] + b"\xff" + HEADER[6:]], "message kind 255 is unknown"),
    "short header": ([HEADER[:-1]], "shorter than a header"),
    "no frame": ([b""], "shorter than a header"),
    "long fields": ([HEADER + b"more"], "BYE has 4 bytes of fields, not 0"),
    "many frames": ([os.urandom(64) for _ in range(100)], "magic"),
    "a server's message": ([wire.pack(Kind.RESULT, 0, 0)], "RESULT is not for a server"),
    "call without handshake": ([wire.pack(Kind.GATHER, 0, 0, 1.0), b"data"], "not a valid call of a member"),
    "proof without challenge": ([wire.pack(Kind.PROOF, 0, b"p" * 32)], "a proof without a challenge"),
    "pickle": ([pickle.dumps(Bomb())], "magic"),
}


def finish_job(job: Job, first: Future[RendezvousBootstrap], caplog: pytest.LogCaptureFixture, logged: str) -> None:
    """The refusal is in the log, and the two real ranks get on as if nothing had happened."""
    records = [record for record in caplog.records if record.name == "commlib.bootstrap"]
    assert any(record.levelno == logging.WARNING for record in records)
    assert re.search(rf"refused a peer from 127\.0\.0\.1: .*{logged}", caplog.text), caplog.text
    assert TOKEN not in caplog.text
    ranks = [job.enter(1, 2), first.result()]
    assert job.on_all(ranks, lambda b: b.allgather(b"%d" % b.rank, timeout_s=5)) == [[b"0", b"1"]] * 2
    close_all(ranks)


def start_rank_zero(job: Job) -> Future[RendezvousBootstrap]:
    """Rank 0 of 2 has joined and waits for rank 1."""
    first = job.join(0, 2)
    endpoint = parse_endpoint(job.endpoint)

    def has_joined() -> bool:
        running = server._servers.get(endpoint)
        return running is not None and 0 in running._instances.get(0, server._Instance(2)).arrived

    assert wait_for(has_joined)
    return first


@pytest.mark.parametrize("name", HANDSHAKES)
def test_handshake_of_a_stranger_is_refused_and_logged(job: Job, name: str, caplog: pytest.LogCaptureFixture) -> None:
    claims, reason, logged = HANDSHAKES[name]
    first = start_rank_zero(job)
    with Stranger(job.endpoint) as stranger:
        assert refusal(stranger.shake_hands(**claims)) is reason
        # A refused peer has gained nothing.
        assert refusal(stranger.ask(wire.pack(Kind.GATHER, 0, 0, 1.0), b"data")) is Refusal.BAD_MESSAGE
    finish_job(job, first, caplog, logged)


@pytest.mark.parametrize("name", MESSAGES)
def test_foreign_message_is_refused_and_logged(
    job: Job, name: str, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    frames, logged = MESSAGES[name]
    first = start_rank_zero(job)
    with Stranger(job.endpoint) as stranger:
        assert refusal(stranger.ask(*frames)) is Refusal.BAD_MESSAGE
    finish_job(job, first, caplog, re.escape(logged))
    assert not list(tmp_path.iterdir()), "something from the wire was executed"


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"\xff" + b"\0" * 63, b""])
def test_peer_that_does_not_speak_zeromq_disturbs_nobody(job: Job, data: bytes) -> None:
    first = start_rank_zero(job)
    send_raw(job.endpoint, data)
    ranks = [job.enter(1, 2), first.result()]
    assert job.on_all(ranks, lambda b: b.allgather(b"%d" % b.rank, timeout_s=5)) == [[b"0", b"1"]] * 2
    close_all(ranks)


def test_member_out_of_step_is_refused_and_the_others_get_a_timeout_that_names_it(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = job.open(2)
    ranks[1]._round += 1  # as if it had made one call more than the other
    waiting = job.pool.submit(ranks[0].barrier, 0.7)
    with pytest.raises(ConfigError, match="calls are not those of the other ranks"):
        ranks[1].barrier(5)
    error = waiting.exception()
    assert isinstance(error, CommTimeout) and error.peer == 1
    assert "rank 1 is in round 2, the job in 1" in caplog.text
    close_all(ranks)


def test_stranger_that_never_answers_is_forgotten(
    job: Job, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_CHALLENGE_LIFE_S", 0.2)
    first = start_rank_zero(job)
    running = server._servers[parse_endpoint(job.endpoint)]
    with Stranger(job.endpoint) as stranger:
        stranger.ask(wire.pack(Kind.HELLO, 0, 1, 2, b"n" * wire.NONCE_BYTES))
        assert running._challenges
        assert wait_for(lambda: not running._challenges)
    assert "never answered the challenge" in caplog.text
    close_all([job.enter(1, 2), first.result()])


def test_overheard_proof_is_worth_nothing_on_another_connection(job: Job) -> None:
    first = start_rank_zero(job)
    nonce = b"n" * wire.NONCE_BYTES
    hello = wire.pack(Kind.HELLO, 0, 1, 2, nonce)
    with Stranger(job.endpoint) as victim, Stranger(job.endpoint) as thief:
        server_nonce = victim.ask(hello).fields[1]
        assert thief.ask(hello).fields[1] != server_nonce
        overheard = wire.proof(
            TOKEN, "client", instance=0, rank=1, size=2, client_nonce=nonce, server_nonce=server_nonce
        )
        assert refusal(thief.ask(wire.pack(Kind.PROOF, 0, overheard))) is Refusal.BAD_TOKEN
    close_all([job.enter(1, 2), first.result()])


def test_second_process_with_the_same_rank_is_told_so(job: Job) -> None:
    ranks = job.open(2)
    code = (
        "from commlib.bootstrap.rendezvous import RendezvousBootstrap as B\n"
        f"B(endpoint={job.endpoint!r}, token={TOKEN!r}, rank=1, size=2, timeout_s=10)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "refused rank 1 of 2: another process of the job has this rank already" in done.stderr
    assert job.on_all(ranks, lambda b: b.allgather(b"x", timeout_s=5)) == [[b"x", b"x"]] * 2
    close_all(ranks)


def test_wrong_token_of_a_rank_is_reported_on_that_rank(job: Job) -> None:
    first = start_rank_zero(job)
    with pytest.raises(ConfigError, match="COMMLIB_JOB_TOKEN differs from rank 0's"):
        job.enter(1, 2, token="a typo")
    close_all([job.enter(1, 2), first.result()])


def test_server_that_does_not_know_the_token_is_not_believed_and_never_sees_it(job: Job) -> None:
    context = zmq.Context()
    impostor = context.socket(zmq.ROUTER)
    impostor.bind(job.endpoint)
    heard: list[bytes] = []

    def deceive() -> None:
        for reply in (lambda m: wire.pack(Kind.CHALLENGE, 0, m.fields[2], b"s" * 16), lambda _: welcome):
            assert impostor.poll(5000)
            identity, *frames = impostor.recv_multipart()
            heard.extend(frames)
            impostor.send_multipart([identity, reply(wire.unpack(frames))])

    welcome = wire.pack(Kind.WELCOME, 0, hmac.digest(b"guess", b"", "sha256"))
    deceiving = job.pool.submit(deceive)
    with pytest.raises(ConfigError, match="does not know the job token: it is not rank 0"):
        job.enter(1, 2, timeout_s=5)
    deceiving.result()
    context.destroy(linger=0)
    assert len(heard) == 2
    assert all(TOKEN.encode() not in frame for frame in heard)


def forbidden(source: str) -> list[str]:
    """Names in a source that would run or unpickle what comes from the wire."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Name):
            found.append(node.id)
        elif isinstance(node, ast.Attribute):
            found.append(node.attr)
    bad = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "eval", "exec", "send_pyobj", "recv_pyobj"}
    bad |= {"all_gather_object", "gather_object", "broadcast_object_list", "bcast", "recv", "irecv", "isend"}
    return sorted(bad.intersection(found))


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_no_source_unpickles_or_evaluates(path: Path) -> None:
    assert forbidden(path.read_text()) == []


def test_the_check_for_forbidden_names_finds_them() -> None:
    assert forbidden("import pickle\nfrom torch.distributed import all_gather_object\ncomm.bcast(1)\neval('1')") == [
        "all_gather_object",
        "bcast",
        "eval",
        "pickle",
    ]
