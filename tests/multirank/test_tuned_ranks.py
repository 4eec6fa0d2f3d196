"""Tuned plans among ranks: rank 0's file counts, and no plan changes a result. *_rank run on every rank."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from moe_job import free_ports, part_of_job
from test_dispatch_combine import check_cases, check_fp8, config_of, workload_of

from commlib.cli.tune import _neighbours
from commlib.runtime import Runtime
from commlib.testing.spawn import check_ranks, run_ranks
from commlib.topology import Topology
from commlib.tuned_plans import read_plans, shape_key, store_plan

pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem
NODES = (0, 0, 1, 1)
# Not the defaults, which the small configurations of other tests replace.
FIELDS = {"chunk_tokens": 32, "chunk_bytes": 64 * 1024, "ring_bytes": 512 * 1024}
START = {"chunk_tokens": 4, "chunk_bytes": 4096, "ring_bytes": 16384}


def plan_rank(port: int, folder: str) -> None:
    """Rank 0 has a plan, rank 1 another one, rank 2 a broken file, rank 3 none."""
    rank = int(os.environ["COMMLIB_RANK"])
    path = Path(folder) / f"rank-{rank}.json"
    os.environ["COMMLIB_PLANS"] = "off" if rank == 3 else str(path)
    group = part_of_job(port, rank, len(NODES))
    config = config_of(workload_of("uniform", NODES), **FIELDS)
    topology = Topology(NODES)
    shape = shape_key(config, "cpu")
    for plan in (START, *_neighbours(START)):
        if rank == 2:
            path.write_text("{")
        else:
            store_plan(path, shape, topology, plan if rank == 0 else {"ring_bytes": 1 << 20})
        with Runtime(group, config, topology=topology) as runtime:
            assert {name: getattr(runtime.config, name) for name in plan} == plan
            assert f"tuned plan: {json.dumps(plan)}" in runtime.describe()
            check_cases(runtime, ("uniform", "masked"), NODES)
            check_fp8(runtime, ("masked",), NODES, ("grouped",))
    group.close()


def test_ranks_agree_and_results_stay(tmp_path: Path) -> None:
    check_ranks(
        f"{HERE}:plan_rank",
        len(NODES),
        args=[free_ports(1)[0], str(tmp_path)],
        env={"UCX_TLS": "tcp,self"},
        timeout_s=200,
    )


def tune_rank(path: str) -> None:
    from commlib.cli import main

    os.environ["COMMLIB_PLANS"] = path
    raise SystemExit(main(["bench", "--tune", "--shapes", "64x256", "--iterations", "1", "--warmup", "1"]))


def test_bench_tunes(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    results = run_ranks(
        f"{HERE}:tune_rank",
        2,
        args=[str(path)],
        ranks_per_node=1,
        env={"UCX_TLS": "tcp,self"},
        launcher="mpirun",
        timeout_s=200,
    )
    assert all(result.returncode == 0 for result in results), results
    assert "64 tokens x 256, top-8 of 64" in results[0].stdout and str(path) in results[0].stdout
    (entry,) = read_plans(path).entries
    assert entry.node_sizes == [1, 1] and entry.shape["hidden"] == 256
    assert set(entry.plan) == {"chunk_tokens", "chunk_bytes", "ring_bytes"}
