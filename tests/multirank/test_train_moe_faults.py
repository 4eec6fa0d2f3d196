"""examples/train_moe loses a rank: all others end the step with commlib's error, and fewer of them go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import train_moe_job
from test_train_moe_ranks import assert_same_to_rounding, read
from train_moe_fault_job import LOST

from commlib.testing.spawn import check_ranks, run_ranks
from commlib.trace import read_trace
from examples.train_moe.faults import EXIT_STATUS
from examples.train_moe.history import History

pytestmark = pytest.mark.multirank

ROOT = Path(__file__).resolve().parents[2]
HEARTBEAT_S = 1.5
# Beyond that: passing the news on, leaving, and a machine with other work.
SLACK_S = 4.0


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank that nobody disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    train_moe_job.straight(str(folder))
    return folder


@pytest.mark.parametrize(
    ("where", "parallel"),
    [
        ("experts", {}),  # the others are in dispatch or combine
        ("gradients", {}),  # the others are in gloo
        ("experts", {"ep_ranks": 2, "shard_dense": True}),  # half of them have no Runtime with the lost rank
    ],
)
def test_two_nodes_lose_a_rank_and_one_node_goes_on(
    where: str, parallel: dict[str, Any], straight: Path, tmp_path: Path
) -> None:
    results = run_ranks(
        "train_moe_fault_job:killed",
        4,
        args=[str(tmp_path), where, parallel],
        ranks_per_node=2,
        env={"COMMLIB_HEARTBEAT_TIMEOUT": str(HEARTBEAT_S)},
        timeout_s=60,
    )
    shown = "\n".join(result.stderr[-2000:] for result in results)
    assert [result.returncode for result in results] == [EXIT_STATUS] * LOST + [-signal.SIGKILL], shown
    *caught, gone = (json.loads(result.stdout.splitlines()[-1]) for result in results)
    for rank, fault in enumerate(caught):
        assert fault["at"] - gone["at"] < HEARTBEAT_S + SLACK_S, fault
        assert f"rank {rank}: {fault['type']}: " in results[rank].stderr
    if not parallel:
        assert [(fault["type"], fault["peer"]) for fault in caught] == [("PeerLostError", LOST)] * LOST
    assert {fault["type"] for fault in caught} <= {"PeerLostError", "TransportError"}

    check_ranks("train_moe_job:resumed", 2, args=[str(tmp_path)], ranks_per_node=2, timeout_s=60)
    assert_same_to_rounding(read(tmp_path, "resumed", 2), read(straight, "straight", 1), train_moe_job.SAVE_AT)


def test_launcher_runs_the_job_again_with_fewer_ranks(tmp_path: Path) -> None:
    """The whole example under mpirun; the rank is killed from outside, once there is a checkpoint."""
    mark = uuid.uuid4().hex
    sizes = "--hidden 32 --dense-width 48 --num-layers 2 --num-experts 8 --num-topk 2 --expert-width 16 --seq-len 16"
    command = [ROOT / "launch" / "restart", "-n 4", "-n 2", "--", ROOT / "launch" / "mpirun", "{}", sys.executable]
    command += ["-m", "examples.train_moe", "--resume", "--checkpoint-every", "5", "--out", tmp_path, *sizes.split()]
    command += ["--trace", "2", "--steps", "60", "--global-batch", "8", "--dtype", "fp32"]
    environment = {**os.environ, "TEST_RESTART_MARK": mark, "COMMLIB_RANKS_PER_NODE": "2", "UCX_TLS": "tcp,self"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        try:
            wait_for_checkpoint(tmp_path / "checkpoints", job)
            os.kill(pid_of_rank(2, mark), signal.SIGKILL)
            output, _ = job.communicate(timeout=120)
        finally:
            job.terminate()
    assert job.returncode == 0, output
    first, second = output.split("restart: ")[1::2]
    assert "-n 4" in first and "-n 2" in second, output
    assert "commlib rank 0 of 2 on 1 nodes" in second and "resumed from" in second, output
    assert "/60" in second and "held out" in second, output
    assert "overlap: " in second and read_trace(tmp_path / "trace.json").keys() == {0, 1}, output
    assert [step["step"] for step in History.read(tmp_path / "metrics.jsonl")] == list(range(60))


def wait_for_checkpoint(root: Path, job: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not list(root.glob("step-*/.metadata")):
        assert time.monotonic() < end and job.poll() is None, job.communicate()[0]
        time.sleep(0.02)


def pid_of_rank(rank: int, mark: str) -> int:
    """The process that a launcher gave this rank, among those with our mark."""
    wanted = {f"TEST_RESTART_MARK={mark}".encode()}
    names = {f"{name}={rank}".encode() for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK")}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = set(path.read_bytes().split(b"\0"))
        except OSError:
            continue  # not ours, or it has just ended
        if wanted <= variables and names & variables:
            return int(path.parent.name)
    raise AssertionError(f"no process of rank {rank}")
