"""The verbs provider over real RDMA ports: soft-RoCE in a machine of its own (launch/rdma-guest).

The machine runs everything once (guest.py); the tests here judge what it reports. The ports' hardware counters are part
of that: had the bytes taken another way, the ports would not have counted them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
VERBS_TEST = ROOT / "build" / "native-tests" / "verbs_test"
NUM_RANKS, LOST = 4, 3
MTU = 4096  # bytes of the largest packet's payload

pytestmark = pytest.mark.rdma

DISPATCHES = ("dispatch 2 x 2", "dispatch 4 x 1", "dispatch 4 x 1, threads", "dispatch, loss")
LOSSY = ("native, loss", "dispatch, loss")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("rdma-guest")
    command = [
        *(ROOT / "launch" / "rdma-guest", "--timeout", "400", "--out", out),
        *(sys.executable, ROOT / "tests" / "rdma" / "guest.py", VERBS_TEST, "/host-out/report.json"),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    loaded: dict[str, Any] = json.loads((out / "report.json").read_text())
    return loaded


def part_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    part: dict[str, Any] = report[name]
    assert "error" not in part, part["error"]
    return part


def grown(part: dict[str, Any], counter: str) -> int:
    """By how much a counter grew, both ports together."""
    return sum(int(port[counter]) for port in part["counters"].values())


def assert_ranks_passed(part: dict[str, Any]) -> list[dict[str, Any]]:
    for rank, result in enumerate(part["results"]):
        assert result is not None and "error" not in result, f"rank {rank}: {result and result['error']}"
    assert part["status"] == [0] * NUM_RANKS
    return [result["value"] for result in part["results"]]


@pytest.mark.parametrize(("name", "cases"), [("native", 21), ("native, loss", 4)])
def test_native_tests(report: dict[str, Any], name: str, cases: int) -> None:
    part = part_of(report, name)
    summary = re.search(r"test cases:\s*(\d+) \|\s*(\d+) passed \| (\d+) failed", part["output"])
    assert part["status"] == 0 and summary is not None, part["output"]
    assert int(summary[2]) >= cases and summary[3] == "0", part["output"]
    assert grown(part, "sent_pkts") > 1000


def test_native_tests_met_every_kind_of_error(report: dict[str, Any]) -> None:
    """A dead peer, a peer that is not ready, for ever and for too long: the ports have seen them."""
    part = part_of(report, "native")
    assert grown(part, "retry_exceeded_err") >= 2
    assert grown(part, "rcvd_rnr_err") > 0
    assert grown(part, "retry_rnr_exceeded_err") >= 1


@pytest.mark.parametrize("name", DISPATCHES)
def test_dispatch_and_combine_are_exact_and_went_over_the_ports(report: dict[str, Any], name: str) -> None:
    part = part_of(report, name)
    values = assert_ranks_passed(part)
    for value in values:
        text = value["describe"]
        assert re.search(r"scale-out: (\d threads: )?verbs .*rxe[01]:1 gid \d+ RoCE v2", text), text
        assert re.search(r"rank \d: rc/rxe[01]:1", text), text
        assert value["payload"] == value["bound"] > 0
    # Every payload byte is in some packet of at most MTU bytes, and each is received by one of the ports.
    packets = sum(value["payload"] for value in values) // MTU
    assert grown(part, "sent_pkts") > packets and grown(part, "rcvd_pkts") > packets
    for port in part["counters"].values():
        assert port["sent_pkts"] > 0 and port["rcvd_pkts"] > 0


def test_signals_by_immediate_were_signals_by_immediate(report: dict[str, Any]) -> None:
    values = assert_ranks_passed(part_of(report, "dispatch 4 x 1"))
    assert all("signals by immediate" in value["describe"] for value in values)


@pytest.mark.parametrize("name", LOSSY)
def test_lost_packets_were_lost_and_sent_again(report: dict[str, Any], name: str) -> None:
    part = part_of(report, name)
    assert part["dropped"] > 0
    assert grown(part, "completer_retry_err") + grown(part, "rcvd_seq_err") > 0


def test_a_rank_that_dies_is_lost_to_the_others(report: dict[str, Any]) -> None:
    part = part_of(report, "lost rank")
    assert part["status"] == [0, 0, 0, -9]
    for rank, result in enumerate(part["results"]):
        if rank == LOST:
            continue
        assert "error" not in result, result
        told = result["value"]
        assert told["type"] == "PeerLostError" and told["peer"] == LOST, told
        assert told["seconds"] < 30 and told["close_seconds"] < 10, told
