"""Ranks that die, stop, dawdle or stay away: everybody else hears who it was, in time, and can go on without them.

Functions named *_rank run on every rank. They print what they caught; the tests look at it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import commlib
from commlib.bootstrap.rendezvous import RendezvousBootstrap
from commlib.testing.spawn import RankResult, free_port, run_ranks
from commlib.topology import Topology

pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem
HIDDEN = 1024
HEARTBEAT_S = 1.5
# Beyond a limit of ours: a tick of the monitor (heartbeat / 20), passing the news on, and a machine with other work.
SLACK_S = 2.0
NEVER_S = 60.0  # a limit that must not be what ends a wait


@pytest.fixture(autouse=True)
def nothing_remains() -> Iterator[None]:
    """No shared memory and no process outlives a test, however its ranks ended."""
    mark = uuid.uuid4().hex
    os.environ["TEST_FAULTS_MARK"] = mark
    before = shared_memory()
    yield
    del os.environ["TEST_FAULTS_MARK"]
    marked = f"TEST_FAULTS_MARK={mark}".encode()

    def remains() -> list[str]:
        running = [str(path) for path in Path("/proc").glob("[0-9]*/environ") if marked in read(path)]
        return running + sorted(shared_memory() - before)

    # mpirun ends a moment before the ranks that it kills; and other programs of the machine come and go.
    end = time.monotonic() + 10
    while remains() and time.monotonic() < end:
        time.sleep(0.1)
    assert remains() == []


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def shared_memory() -> set[str]:
    """POSIX names of ours and of UCX, and System V segments that nobody has attached."""
    posix = {name for name in os.listdir("/dev/shm") if name.startswith(("commlib", "ucx"))}
    segments = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    return posix | {f"sysv {fields[1]}" for fields in segments if fields[6] == "0"}


def reports(results: list[RankResult], case: str) -> list[dict[str, Any]]:
    """What the ranks told of a case."""
    lines = [line for result in results for line in result.stdout.splitlines() if line.startswith("{")]
    return [each for each in map(json.loads, lines) if each["case"] == case]


# --- on the ranks -------------------------------------------------------------------------------------------------


def open_runtime(port: int, rank: int, nodes: tuple[int, ...], **limits: float) -> commlib.Runtime:
    group = RendezvousBootstrap(
        endpoint=f"tcp://127.0.0.1:{port}", token="test", rank=rank, size=len(nodes), timeout_s=NEVER_S
    )
    config = commlib.RuntimeConfig(
        hidden=HIDDEN,
        num_experts=2 * len(nodes),
        num_topk=2,
        max_tokens=256,
        expert_alignment=1,
        max_arena_bytes=1 << 28,
        **{"timeout_s": NEVER_S, "heartbeat_timeout_s": HEARTBEAT_S, **limits},  # type: ignore[arg-type]
    )
    runtime = commlib.Runtime(group, config, topology=Topology(nodes))
    group.close()
    return runtime


def inputs(runtime: commlib.Runtime, num_tokens: int = 200) -> tuple[Any, Any]:
    """Every token goes to two ranks."""
    x = np.full((num_tokens, HIDDEN), runtime.rank + 1, dtype=np.float32)
    experts = 2 * np.arange(num_tokens) % (2 * runtime.num_ranks)
    return x, np.stack([experts, (experts + 2) % (2 * runtime.num_ranks)], axis=1)


def check_usable(runtime: commlib.Runtime) -> None:
    for _ in range(3):
        x, idx = inputs(runtime, 50)
        got = runtime.dispatch(x, idx)
        assert (runtime.combine(got.x, got.handle).x == 2 * x).all()


def report(case: str, source: int, /, **values: object) -> None:
    line = json.dumps({"case": case, "from": source, "at": time.time(), **values})
    os.write(1, f"{line}\n".encode())  # at once: UCX writes to the same pipe


def report_error(case: str, rank: int, call: Callable[[], object]) -> None:
    """Runs `call` until it raises."""
    try:
        while True:
            call()
    except commlib.CommError as error:
        report(case, rank, type=type(error).__name__, text=str(error), **error.__dict__)


def end_by_kill(case: str, rank: int) -> None:
    report(case, rank)
    os.kill(os.getpid(), signal.SIGKILL)


def dying_rank(ports: list[int]) -> None:
    """Five ranks become two: each time the last one goes, the others build a Runtime of the rest."""
    rank = int(os.environ["COMMLIB_RANK"])

    runtime = open_runtime(ports[0], rank, (0, 0, 0, 0, 0))
    check_usable(runtime)
    x, idx = inputs(runtime)
    if rank == 4:
        for _ in range(3):
            runtime.dispatch_send(x, idx)
        end_by_kill("kill in dispatch", rank)
    report_error("kill in dispatch", rank, lambda: runtime.dispatch(x, idx))
    report_error("kill in dispatch, again", rank, lambda: runtime.dispatch(x, idx))
    runtime.close()

    runtime = open_runtime(ports[1], rank, (0, 0, 1, 1))
    check_usable(runtime)
    x, idx = inputs(runtime)
    got = runtime.dispatch(x, idx)
    if rank == 3:
        time.sleep(0.5)  # the others wait by then
        end_by_kill("kill across nodes", rank)
    report_error("kill across nodes", rank, lambda: runtime.combine(got.x, got.handle))
    runtime.close()
    assert (got.x != 0).all()  # what was handed out is still there

    runtime = open_runtime(ports[2], rank, (0, 1, 1), heartbeat_timeout_s=NEVER_S)
    check_usable(runtime)
    if rank == 2:
        time.sleep(0.5)
        report("exit", rank)
        raise RuntimeError("the user's own exception")
    x, idx = inputs(runtime)
    report_error("exit", rank, lambda: runtime.dispatch(x, idx))
    runtime.close()

    runtime = open_runtime(ports[3], rank, (0, 1), heartbeat_timeout_s=NEVER_S)
    check_usable(runtime)
    if rank == 1:  # leaves a with-block by an exception, and the process lives on
        try:
            with runtime:
                time.sleep(0.5)
                report("with", rank)
                raise RuntimeError("the user's own exception")
        except RuntimeError:
            time.sleep(1)
    else:
        report_error("with", rank, lambda: runtime.dispatch(*inputs(runtime)))
    with open_runtime(ports[3], rank, (0, 1)) as last:
        check_usable(last)
    report("survived", rank)


def living_rank(ports: list[int]) -> None:
    """Nobody dies here, but all that is not liveness goes wrong."""
    rank = int(os.environ["COMMLIB_RANK"])
    nodes = (0, 0, 1, 1)

    with open_runtime(ports[0], rank, nodes, heartbeat_timeout_s=1.0) as runtime:
        if rank == 1:
            time.sleep(3)
            start = time.monotonic()
            while time.monotonic() - start < 2:
                sum(range(3_000_000))  # in one go, with the GIL
        check_usable(runtime)
        report("slow", rank)

    runtime = open_runtime(ports[1], rank, nodes, timeout_s=2.0, heartbeat_timeout_s=NEVER_S)
    check_usable(runtime)
    x, idx = inputs(runtime)
    report("stays away", rank, epoch=runtime.dispatch(x, idx).handle.epoch)
    if rank == 2:
        time.sleep(4)
    report_error("stays away", rank, lambda: runtime.dispatch(x, idx))
    runtime.close()

    runtime = open_runtime(ports[2], rank, nodes)
    check_usable(runtime)
    if rank == 1:
        time.sleep(0.5)  # the others have by then what they still need of this rank
        wake = f"sleep {2 * HEARTBEAT_S + SLACK_S}; kill -CONT {os.getpid()}"
        with subprocess.Popen(["sh", "-c", wake]):
            report("stop", rank)
            os.kill(os.getpid(), signal.SIGSTOP)
        report("awake", rank)
    report_error("stop", rank, lambda: runtime.dispatch(x, idx))
    runtime.close()
    with open_runtime(ports[3], rank, nodes) as last:  # with the one that was away
        check_usable(last)
    report("survived", rank)


# --- ends of ranks ------------------------------------------------------------------------------------------------


def check_lost(results: list[RankResult], case: str, lost: int, within_s: float) -> list[dict[str, Any]]:
    """All ranks below `lost` raised PeerLostError that names it, that soon after it said that it would go."""
    told = reports(results, case)
    (gone_at,) = [each["at"] for each in told if "type" not in each]
    caught = sorted((each for each in told if "type" in each), key=lambda each: int(each["from"]))
    assert [each["from"] for each in caught] == list(range(lost)), told
    for each in caught:
        assert (each["type"], each["peer"]) == ("PeerLostError", lost), each
        assert f"rank {lost} is lost: " in each["text"], each
        assert f"rank {each['from']} was in {each['phase']}" in each["text"], each
        assert each["at"] - gone_at < within_s, each
    return caught


def test_whoever_goes_is_named_and_the_rest_goes_on() -> None:
    ports = [free_port() for _ in range(4)]
    results = run_ranks(f"{HERE}:dying_rank", 5, args=[ports], env={"UCX_TLS": "tcp,self"}, timeout_s=90)
    shown = "\n".join(result.stderr[-2000:] for result in results)
    assert [result.returncode for result in results] == [0, 0, 1, -signal.SIGKILL, -signal.SIGKILL], shown

    caught = check_lost(results, "kill in dispatch", 4, HEARTBEAT_S + SLACK_S)
    assert all("no heartbeat for" in each["text"] and each["phase"].startswith("dispatch/") for each in caught)
    again = reports(results, "kill in dispatch, again")  # a fault is terminal: no second wait
    assert [(each["type"], each["peer"]) for each in again] == [("PeerLostError", 4)] * 4
    caught = check_lost(results, "kill across nodes", 3, HEARTBEAT_S + SLACK_S)
    assert all(each["phase"].startswith("combine/") for each in caught)
    for case, lost in (("exit", 2), ("with", 1)):
        caught = check_lost(results, case, lost, SLACK_S)
        assert all("closed without a barrier" in each["text"] for each in caught), caught
    assert "RuntimeError: the user's own exception" in results[2].stderr
    assert [each["from"] for each in reports(results, "survived")] == [0, 1]


# --- nobody ends --------------------------------------------------------------------------------------------------


def test_slow_absent_and_stopped_ranks() -> None:
    ports = [free_port() for _ in range(4)]
    results = run_ranks(f"{HERE}:living_rank", 4, args=[ports], timeout_s=90)
    shown = "\n".join(result.stderr[-2000:] for result in results)
    assert [result.returncode for result in results] == [0] * 4, shown
    assert len(reports(results, "slow")) == 4
    check_stays_away(results)
    check_lost_while_stopped(results)
    assert len(reports(results, "survived")) == 4


def check_stays_away(results: list[RankResult]) -> None:
    """Also rank 2 raises, when it comes at last, and no second time-out has to pass for that."""
    told = reports(results, "stays away")
    epochs = {each["epoch"] for each in told if "epoch" in each}
    caught = [each for each in told if "type" in each]
    assert len(epochs) == 1 and [each["from"] for each in caught] == [0, 1, 2, 3]
    epoch = epochs.pop() + 1
    for each in caught:
        assert (each["type"], each["peer"], each["phase"]) == ("CommTimeout", 2, "dispatch/exchange"), each
        assert (each["tag"], each["expected"], each["seen"]) == (epoch, epoch, epoch - 1), each
        assert each["channel"] == f"2 -> {each['rank']}" and each["rank"] in (0, 1, 3), each
        assert each["text"].startswith(
            f"rank {each['rank']} waited for rank 2 in dispatch/exchange on channel 2 -> {each['rank']}, "
            f"epoch {epoch}: expected {epoch}, seen {epoch - 1}; no progress for 2."
        ), each
    began = max(each["at"] for each in told if "epoch" in each)
    waited = {each["from"]: each["at"] - began for each in caught}
    assert all(waited[rank] < 2.0 + SLACK_S for rank in (0, 1, 3)), waited
    assert waited[2] < 4 + 1.0, waited


def check_lost_while_stopped(results: list[RankResult]) -> None:
    told = reports(results, "stop")
    (stopped_at,) = [each["at"] for each in told if "type" not in each]
    (awake_at,) = [each["at"] for each in reports(results, "awake")]
    assert awake_at - stopped_at > 2 * HEARTBEAT_S
    caught = {each["from"]: each for each in told if "type" in each}
    assert sorted(caught) == [0, 1, 2, 3]
    for rank, each in caught.items():
        assert (each["type"], each["peer"]) == ("PeerLostError", 1), each
        since = awake_at if rank == 1 else stopped_at
        assert each["at"] - since < (0 if rank == 1 else HEARTBEAT_S) + SLACK_S, each


# --- under mpirun -------------------------------------------------------------------------------------------------


def mpi_stopped_rank() -> None:
    from mpi4py import MPI

    config = commlib.RuntimeConfig(
        hidden=HIDDEN, num_experts=6, num_topk=2, max_tokens=64, heartbeat_timeout_s=1.5, timeout_s=NEVER_S
    )
    runtime = commlib.Runtime(MPI.COMM_WORLD, config, topology=Topology((0, 0, 1)))
    check_usable(runtime)
    if runtime.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        runtime.dispatch(*inputs(runtime))
    except commlib.CommError:
        traceback.print_exc()
        time.sleep(2)  # whoever leaves first with an error takes the others along
        raise


def test_survivors_under_mpirun_show_their_exception() -> None:
    """Of a rank that no longer runs. One that is killed, mpirun would see first: it kills all others within
    milliseconds, and with -disable-auto-cleanup now and then all the same (Hydra 5.0.2, one run of ten)."""
    results = run_ranks(f"{HERE}:mpi_stopped_rank", 3, launcher="mpirun", timeout_s=30)
    for rank in (0, 2):
        assert "PeerLostError: rank 1 is lost: no heartbeat for" in results[rank].stderr, results[rank].stderr
    assert all(result.returncode != 0 for result in results)


def mpi_absent_rank() -> None:
    from mpi4py import MPI

    config = commlib.RuntimeConfig(hidden=HIDDEN, num_experts=6, num_topk=2, max_tokens=64, timeout_s=1.5)
    runtime = commlib.Runtime(MPI.COMM_WORLD, config, topology=Topology((0, 0, 1)))
    if runtime.rank == 1:
        time.sleep(NEVER_S)
    runtime.dispatch(*inputs(runtime))


def test_plain_mpirun_shows_the_exception_and_ends_the_job() -> None:
    """The first rank that raises prints it and ends the job; nobody waits for the rank that sleeps."""
    start = time.monotonic()
    results = run_ranks(f"{HERE}:mpi_absent_rank", 3, launcher="mpirun", timeout_s=30)
    assert time.monotonic() - start < 20
    shown = [rank for rank in (0, 2) if "CommTimeout: rank" in results[rank].stderr]
    assert shown and all("waited for rank 1 in dispatch/exchange" in results[rank].stderr for rank in shown), results
    assert all(result.returncode != 0 for result in results)
