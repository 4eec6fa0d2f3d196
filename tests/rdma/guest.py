"""Inside the machine of launch/rdma-guest: the parts of test_soft_roce.py that need RDMA ports.

    guest.py VERBS_TEST REPORT        runs all parts, writes what they found to REPORT (JSON)

Every part records how it ended, what it printed and by how much each port's counters grew meanwhile. Judging is the
caller's business. No torch here: importing it takes a minute under emulation. numpy takes seconds, so ranks are forks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import moe_numpy

PORTS = ("rxe0", "rxe1")
CABLE = ("eth0", "eth1")
NUM_RANKS = 4
# Soft-RoCE under emulation is slow, and a lost packet costs an acknowledge time-out: 4.096 us * 2^15 = 134 ms.
VERBS = {"COMMLIB_TRANSPORT": "verbs", "COMMLIB_ACK_TIMEOUT": "15"}


def counters() -> dict[str, dict[str, int]]:
    """Hardware counters of both ports."""
    found = {}
    for port in PORTS:
        folder = Path("/sys/class/infiniband") / port / "ports" / "1" / "hw_counters"
        found[port] = {file.name: int(file.read_text()) for file in folder.iterdir() if file.name != "lifespan"}
    return found


def dropped() -> int:
    """Packets that the cable has lost on purpose, both ends."""
    total = 0
    for end in CABLE:
        text = subprocess.run(["tc", "-s", "-j", "qdisc", "show", "dev", end], capture_output=True, check=True).stdout
        total += sum(int(queue.get("drops", 0)) for queue in json.loads(text) if queue["kind"] == "netem")
    return total


@contextmanager
def packet_loss(percent: float) -> Iterator[None]:
    for end in CABLE:
        subprocess.run(["tc", "qdisc", "add", "dev", end, "root", "netem", "loss", f"{percent}%"], check=True)
    try:
        yield
    finally:
        for end in CABLE:
            subprocess.run(["tc", "qdisc", "del", "dev", end, "root"], check=True)


def run_native(verbs_test: str, *arguments: str, timeout_s: float = 120) -> dict[str, Any]:
    """The native tests, or those that the arguments choose."""
    command = [verbs_test, "--nics", ",".join(PORTS), "--peer-nics", ",".join(reversed(PORTS)), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s)
    return {"status": done.returncode, "output": done.stdout}


def run_ranks(
    body: Callable[[int], Any], ranks_per_node: int, environment: dict[str, str], timeout_s: float = 120
) -> dict[str, Any]:
    """body(rank) on forks of this process, a port per node; what each returned, or its traceback."""
    job = {
        "COMMLIB_RENDEZVOUS": "tcp://127.0.0.1:2901",
        "COMMLIB_JOB_TOKEN": "a token of this test",
        "COMMLIB_WORLD_SIZE": str(NUM_RANKS),
    }
    children: dict[int, int] = {}  # pid -> rank
    pipes = []
    for rank in range(NUM_RANKS):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.environ.update(VERBS | job | environment)
            os.environ["COMMLIB_RANK"] = str(rank)
            os.environ["COMMLIB_RANKS_PER_NODE"] = str(ranks_per_node)
            os.environ["COMMLIB_NICS"] = PORTS[rank // ranks_per_node % len(PORTS)]
            run_rank(body, rank, write_end)
        os.close(write_end)
        children[pid] = rank
        pipes.append(read_end)
    status = wait_for(children, time.monotonic() + timeout_s)
    results = []
    for pipe in pipes:
        with os.fdopen(pipe) as file:
            text = file.read()
        results.append(json.loads(text) if text else None)
    return {"status": status, "results": results}


def run_rank(body: Callable[[int], Any], rank: int, write_end: int) -> None:
    """Does not return."""
    code = 1
    try:
        result = {"value": body(rank)}
        code = 0
    except BaseException:
        result = {"error": traceback.format_exc()}
    with os.fdopen(write_end, "w") as file:
        json.dump(result, file)
    os._exit(code)


def wait_for(children: dict[int, int], deadline: float) -> list[int]:
    """Exit status of every rank, negative if a signal ended it. Ranks that are late are killed."""
    status = [0] * NUM_RANKS
    while children:
        pid, wait_status = os.waitpid(-1, os.WNOHANG)
        if pid in children:
            status[children.pop(pid)] = os.waitstatus_to_exitcode(wait_status)
        elif time.monotonic() > deadline:
            for late in children:
                os.kill(late, signal.SIGKILL)
            deadline += 60
        else:
            time.sleep(0.02)
    return status


class Report:
    """Parts by name; written after each, so that a part that hangs does not hide the others."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: dict[str, Any] = {}

    def add(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        print(f"== {name}", flush=True)
        before, started = counters(), time.monotonic()
        try:
            part = run()
        except Exception:
            part = {"error": traceback.format_exc()}
        part["seconds"] = time.monotonic() - started
        part["counters"] = {
            port: {name: value - before[port][name] for name, value in now.items()} for port, now in counters().items()
        }
        self._parts[name] = part
        self._path.write_text(json.dumps(self._parts, indent=1))
        print(f"== {name}: {part['seconds']:.1f} s", flush=True)


def with_loss(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    with packet_loss(0.5):
        part = run()
        part["dropped"] = dropped()
    return part


def main(verbs_test: str, report_path: str) -> None:
    report = Report(Path(report_path))
    report.add("native", lambda: run_native(verbs_test))
    report.add("dispatch 2 x 2", lambda: run_ranks(moe_numpy.check_rank, 2, {}))
    report.add("dispatch 4 x 1", lambda: run_ranks(moe_numpy.check_rank, 1, {"COMMLIB_SIGNAL": "immediate"}))
    threads = {"COMMLIB_NUM_PROXY_THREADS": "3"}
    report.add("dispatch 4 x 1, threads", lambda: run_ranks(moe_numpy.check_rank, 1, threads))
    report.add("lost rank", lambda: run_ranks(moe_numpy.lose_rank, 2, {"COMMLIB_RETRY_COUNT": "3"}))
    report.add("native, loss", lambda: with_loss(lambda: run_native(verbs_test, "-tc=threads*,processes*,*larger*")))
    many = partial(moe_numpy.check_rank, num_rounds=10)  # so that some of the packets get lost
    report.add("dispatch, loss", lambda: with_loss(lambda: run_ranks(many, 2, {})))


if __name__ == "__main__":
    main(*sys.argv[1:])
