"""The launchers for clusters, with stand-ins for what a cluster has: they must start ranks that find each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from commlib.testing.spawn import free_port

pytestmark = pytest.mark.multirank

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1 2 3; do SLURM_PROCID=$rank "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""


def test_slurm_ranks_meet(tmp_path: Path) -> None:
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/sh\n[ "$*" = "show hostnames here" ] && echo 127.0.0.1\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    program = tmp_path / "program.py"
    program.write_text(
        "import os, commlib\n"
        "with commlib.Runtime(None, commlib.RuntimeConfig(hidden=64, num_experts=4, num_topk=1)) as rt:\n"
        "    line = f'rank {rt.rank} of {rt.num_ranks} {rt.topology.num_nodes} nodes'\n"
        "    os.write(1, f'{line}\\n'.encode())\n"  # at once: all ranks write to one pipe
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COMMLIB_")}
    port = free_port() % 20000
    environ |= {
        "PATH": f"{tmp_path}:{environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "here",
        "SLURM_NTASKS": "4", "SLURM_JOB_ID": str(port), "COMMLIB_TRANSPORT": "ucx", "COMMLIB_RANKS_PER_NODE": "2",
        "COMMLIB_LOG": "error", "PYTHON": sys.executable, "UCX_TLS": "tcp,self",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", ROOT / "launch" / "slurm.sbatch", program],
        env=environ, capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of 4 2 nodes" for rank in range(4)]


def test_mpirun_command(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a\nb\n\n")
    command = [ROOT / "launch" / "mpirun-cluster", hosts, "8", "program.py"]
    shown = subprocess.run(command, env={**os.environ, "SHOW": "1"}, capture_output=True, text=True, check=True).stdout
    assert " -n 16 " in shown and str(hosts) in shown and shown.rstrip().endswith("program.py")
    assert subprocess.run(command[:2], capture_output=True, text=True, check=False).returncode == 1
