"""The ZeroMQ rendezvous among friends: calls, deadlines, several instances, and the end of the server."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest
from bootstrap_job import TOKEN, Job, close_all, new_job, server_threads, wait_for

from commlib.bootstrap import connect, server
from commlib.bootstrap.interface import MAX_PAYLOAD_BYTES
from commlib.bootstrap.rendezvous import RendezvousBootstrap, parse_endpoint
from commlib.env import Env
from commlib.errors import CommError, CommTimeout, ConfigError


@pytest.fixture
def job() -> Iterator[Job]:
    with new_job() as each:
        yield each


# --- the job itself ---------------------------------------------------------------------------------------------


def test_allgather_returns_payloads_of_any_length_in_rank_order(job: Job) -> None:
    payloads = [b"rank zero", b"", os.urandom(4 << 20), b"\0" * 3]
    ranks = job.open(4)
    for round_payloads in (payloads, payloads[::-1]):
        results = job.on_all(ranks, lambda b, p=round_payloads: b.allgather(p[b.rank], timeout_s=20))
        assert all(result == round_payloads for result in results)
    close_all(ranks)


def test_barrier_waits_for_the_last_rank(job: Job) -> None:
    ranks = job.open(3)
    times: dict[int, tuple[float, float]] = {}

    def pass_barrier(b: RendezvousBootstrap) -> None:
        time.sleep(0.3 if b.rank == 1 else 0)
        entered = time.monotonic()
        b.barrier(5)
        times[b.rank] = (entered, time.monotonic())

    job.on_all(ranks, pass_barrier)
    assert min(left for _, left in times.values()) >= max(entered for entered, _ in times.values())
    close_all(ranks)


def test_ranks_that_do_not_come_are_named_on_every_rank_that_did(job: Job) -> None:
    start = time.monotonic()
    futures = [job.join(rank, 4, timeout_s=0.7) for rank in (0, 2)]
    errors = [future.exception() for future in futures]
    elapsed_s = time.monotonic() - start
    for error, rank in zip(errors, (0, 2), strict=True):
        assert isinstance(error, CommTimeout), repr(error)
        assert str(error) == "rendezvous: ranks 1, 3 of 4 did not arrive within 0.7 s"
        assert (error.rank, error.expected, error.seen) == (rank, 4, 2)
    assert 0.6 < elapsed_s < 2.5


def test_the_shortest_deadline_decides_for_all(job: Job) -> None:
    patient = job.join(0, 3, timeout_s=60)
    hasty = job.join(1, 3, timeout_s=0.5)
    start = time.monotonic()
    for future in (patient, hasty):
        error = future.exception(timeout=10)
        assert isinstance(error, CommTimeout) and error.peer == 2, repr(error)
        assert "rank 2 of 3 did not arrive" in str(error)
    assert time.monotonic() - start < 3


def test_a_late_rank_hears_at_once_that_the_job_failed(job: Job) -> None:
    assert isinstance(job.join(0, 2, timeout_s=0.3).exception(), CommTimeout)
    start = time.monotonic()
    late = job.join(1, 2, timeout_s=8).exception()
    assert time.monotonic() - start < 3
    assert isinstance(late, CommTimeout) and "rank 1 of 2 did not arrive within 0.3 s" in str(late)
    # The next attempt of both starts afresh.
    ranks = job.open(2)
    assert job.on_all(ranks, lambda b: b.allgather(b"x", timeout_s=5)) == [[b"x", b"x"]] * 2
    close_all(ranks)


def test_missing_rank_zero_is_named_with_its_address(job: Job) -> None:
    start = time.monotonic()
    with pytest.raises(CommTimeout, match=r"rank 0 of 2 did not answer at tcp://127\.0\.0\.1:") as caught:
        job.enter(1, 2, timeout_s=0.4)
    assert caught.value.peer == 0
    assert time.monotonic() - start < 2


def test_rank_that_misses_a_later_call_is_named_and_the_failure_is_final(job: Job) -> None:
    ranks = job.open(3)
    futures = [job.pool.submit(b.allgather, b"x", timeout_s=0.5) for b in ranks if b.rank != 1]
    for future in futures:
        error = future.exception()
        assert isinstance(error, CommTimeout) and "rank 1 of 3 did not arrive within 0.5 s" in str(error)
    with pytest.raises(CommError, match="failed before: rendezvous: rank 1 of 3"):
        ranks[0].barrier(1)
    close_all(ranks)


def test_rank_zero_may_come_last(job: Job) -> None:
    others = [job.join(rank, 3) for rank in (1, 2)]
    time.sleep(0.3)
    ranks = [job.enter(0, 3), *(other.result() for other in others)]
    assert job.on_all(ranks, lambda b: b.allgather(b"%d" % b.rank, timeout_s=5)) == [[b"0", b"1", b"2"]] * 3
    close_all(ranks)


def test_payload_over_the_limit_is_refused_before_it_is_sent(job: Job) -> None:
    (alone,) = job.open(1)
    with pytest.raises(ConfigError, match=f"{MAX_PAYLOAD_BYTES + 1} bytes is longer than {MAX_PAYLOAD_BYTES}"):
        alone.allgather(bytes(MAX_PAYLOAD_BYTES + 1), timeout_s=1)
    assert alone.allgather(b"still works", timeout_s=5) == [b"still works"]
    alone.close()


# --- several bootstraps in a process, and their end -------------------------------------------------------------


def test_consecutive_and_concurrent_instances_do_not_mix(job: Job) -> None:
    first = job.open(2)
    second = job.open(2)
    assert "instance 0" in first[0].describe() and "instance 1" in second[0].describe()
    # Rank 0 calls on the older one first, rank 1 on the newer one.
    slow = job.pool.submit(first[0].allgather, b"old0", timeout_s=5)
    fast = job.pool.submit(second[1].allgather, b"new1", timeout_s=5)
    assert second[0].allgather(b"new0", timeout_s=5) == [b"new0", b"new1"] == fast.result()
    assert first[1].allgather(b"old1", timeout_s=5) == [b"old0", b"old1"] == slow.result()
    close_all(first)
    assert job.on_all(second, lambda b: b.allgather(b"", timeout_s=5)) == [[b"", b""]] * 2
    close_all(second)
    third = job.open(2)
    assert job.on_all(third, lambda b: b.allgather(b"3", timeout_s=5)) == [[b"3", b"3"]] * 2
    close_all(third)


def test_server_ends_and_frees_the_port_when_all_ranks_have_left(job: Job) -> None:
    before = set(server_threads())
    ranks = job.open(2)
    (thread,) = set(server_threads()) - before
    ranks[0].close()
    time.sleep(0.1)
    assert thread.is_alive(), "the other rank is still there"
    ranks[1].close()
    assert wait_for(lambda: not thread.is_alive())
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", parse_endpoint(job.endpoint).port))


def test_close_is_idempotent_and_bounded_without_peers(job: Job) -> None:
    ranks = job.open(2)
    start = time.monotonic()
    for _ in range(2):
        close_all(ranks)
    assert time.monotonic() - start < 1
    with pytest.raises(CommError, match="closed"):
        ranks[1].barrier(1)


def test_next_job_at_the_same_address_replaces_one_that_died(job: Job) -> None:
    abandoned = job.open(2)
    abandoned[0].close()  # rank 1 never says goodbye
    successor = job.enter(0, 1, token="another job")
    assert successor.allgather(b"new", timeout_s=5) == [b"new"]
    successor.close()
    abandoned[1].close()


def test_two_open_jobs_at_one_address_are_refused(job: Job) -> None:
    ranks = job.open(2)
    with pytest.raises(ConfigError, match="serves another job"):
        job.enter(0, 2, token="another job")
    assert job.on_all(ranks, lambda b: b.allgather(b"x", timeout_s=5)) == [[b"x", b"x"]] * 2
    close_all(ranks)


def test_taken_port_is_reported_on_rank_zero(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_BIND_RETRY_S", 0.1)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", parse_endpoint(job.endpoint).port))
        listener.listen()
        with pytest.raises(ConfigError, match=r"cannot listen at tcp://127\.0\.0\.1:\d+: Address already in use"):
            job.enter(0, 2)


# --- arguments --------------------------------------------------------------------------------------------------


def test_connect_meets_at_the_rendezvous_of_the_environment(job: Job) -> None:
    meeting = {"rendezvous": job.endpoint, "job_token": TOKEN, "world_size": 2}
    futures = [job.pool.submit(connect, env=Env(rank=rank, **meeting), timeout_s=10) for rank in range(2)]
    ranks = [future.result() for future in futures]
    assert all(isinstance(rank, RendezvousBootstrap) for rank in ranks)
    assert connect(ranks[0]) is ranks[0]
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("text", ["host:1", "tcp://host", "tcp://host:0", "tcp://host:65536", "ipc://x", "tcp://a b:1"])
def test_bad_endpoint_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not tcp://host:port with port in 1\.\.65535"):
        parse_endpoint(text)


def test_endpoint_parts() -> None:
    assert str(parse_endpoint("tcp://localhost:5")) == "tcp://127.0.0.1:5"
    assert str(parse_endpoint("tcp://[::1]:5")) == "tcp://[::1]:5" and parse_endpoint("tcp://[::1]:5").is_numeric
    assert not parse_endpoint("tcp://node-3.cluster:5").is_numeric


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_impossible_rank_is_refused_before_anything_is_opened(job: Job, rank: int, size: int) -> None:
    with pytest.raises(ConfigError, match=f"rank={rank}, size={size}"):
        job.enter(rank, size)


def test_empty_token_is_refused_with_a_recipe(job: Job) -> None:
    with pytest.raises(ConfigError, match=r"COMMLIB_JOB_TOKEN .*token_hex"):
        job.enter(0, 1, token="")


def test_rank_0_may_leave_as_soon_as_it_has_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process ends while the server is still answering the others."""
    send = server.RendezvousServer._send

    def slowly(self: server.RendezvousServer, identity: bytes, *frames: bytes) -> None:
        send(self, identity, *frames)
        time.sleep(0.1)

    with new_job() as job:
        ranks = job.open(4)
        monkeypatch.setattr(server.RendezvousServer, "_send", slowly)

        def gather(rank: RendezvousBootstrap) -> list[bytes]:
            result = rank.allgather(bytes([rank.rank]), timeout_s=5.0)
            if rank.rank == 0:
                server._stop_all()  # as at the end of the process
            return result

        assert job.on_all(ranks, gather) == [[b"\0", b"\1", b"\2", b"\3"]] * 4
        close_all(ranks)
