"""Several hosts on one machine (launch/nodes): scale-out crosses a network interface, and is counted there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = ROOT / "launch" / "nodes"

pytestmark = [pytest.mark.root, pytest.mark.multirank]


@contextmanager
def hosts(count: int) -> Iterator[dict[str, str]]:
    """`count` fake hosts for the duration; yields the environment that names them."""
    environment = {**os.environ, "NODES_ID": f"t{os.getpid()}", "OMP_NUM_THREADS": "1"}
    # Ranks of one host must find each other by themselves, and nothing may steer them off the network.
    for name in ("COMMLIB_RANKS_PER_NODE", "UCX_TLS"):
        environment.pop(name, None)
    subprocess.run([NODES, "up", str(count)], check=True, env=environment, timeout=60, stdout=subprocess.DEVNULL)
    try:
        yield environment
    finally:
        subprocess.run([NODES, "down"], check=True, env=environment, timeout=60)


def run_job(count: int, per_host: int, num_tokens: int, max_nodes: int) -> list[dict[str, Any]]:
    with hosts(count) as environment:
        done = subprocess.run(
            [
                *(NODES, "mpirun", "-ppn", str(per_host), "-n", str(count * per_host)),
                *(sys.executable, ROOT / "tests" / "multirank" / "nodes_job.py", str(num_tokens), str(max_nodes)),
            ],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return sorted(reports, key=lambda report: int(report["rank"]))


@pytest.mark.parametrize(("count", "per_host", "max_nodes"), [(2, 2, 0), (4, 1, 2)])
def test_bytes_on_the_wire_are_the_lower_bound(count: int, per_host: int, max_nodes: int) -> None:
    reports = run_job(count, per_host, num_tokens=1024, max_nodes=max_nodes)
    assert [report["rank"] for report in reports] == list(range(count * per_host))
    for report in reports:
        assert "tcp/eth0" in report["description"], report["description"]
        assert report["dispatch_bound"] > 0
        assert report["dispatch_payload"] == report["dispatch_bound"], report
        assert report["combine_payload"] == report["combine_bound"], report
        if max_nodes:
            assert report["most_nodes"] <= max_nodes
    for node in range(count):
        on_host = [report for report in reports if report["node"] == node]
        for what in ("dispatch", "combine"):
            payload = sum(int(report[f"{what}_payload"]) for report in on_host)
            # Ranks of a host read the same counter, at slightly different moments; either reading must do.
            for report in on_host:
                assert payload <= report[f"{what}_tx"] <= 1.05 * payload, (what, node, payload, report)
