"""Tuned plans among ranks: rank 0's file counts, and no plan changes a result. *_rank run on every rank."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
from pathlib import Path

import pytest
from moe_job import free_ports, part_of_job
from test_dispatch_combine import check_cases, check_fp8, config_of, workload_of

from commlib.cli.tune import _neighbours
from commlib.config import RuntimeConfig
from commlib.errors import CapacityError, ConfigError
from commlib.runtime import Runtime
from commlib.testing.spawn import check_ranks, run_ranks
from commlib.topology import Topology
from commlib.tuned_plans import read_plans, shape_key, store_plan, topology_key

pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem
NODES = (0, 0, 1, 1)
START = {"chunk_tokens": 4, "chunk_bytes": 4096, "ring_bytes": 16384}
# What a plan may replace: the defaults, in place of what the small configurations of other tests have.
FIELDS = {name: RuntimeConfig.__dataclass_fields__[name].default for name in START}


def plan_rank(port: int, folder: str) -> None:
    """Rank 0 has a plan, rank 1 another one, rank 2 a broken file, rank 3 none."""
    rank = int(os.environ["COMMLIB_RANK"])
    path = Path(folder) / f"rank-{rank}.json"
    os.environ["COMMLIB_PLANS"] = "off" if rank == 3 else str(path)
    group = part_of_job(port, rank, len(NODES))
    config = config_of(workload_of("uniform", NODES), **FIELDS)
    topology = Topology(NODES)
    shape, network = shape_key(config, "cpu"), topology_key(topology, "ucx")
    for plan in (START, *_neighbours(START)):
        if rank == 2:
            path.write_text("{")
        else:
            store_plan(path, shape, network, plan if rank == 0 else {"ring_bytes": 1 << 21})
        with Runtime(group, config, topology=topology) as runtime:
            assert {name: getattr(runtime.config, name) for name in plan} == plan
            assert f"tuned plan, from rank 0's file: {json.dumps(plan)}" in runtime.describe()
            check_cases(runtime, ("uniform", "masked"), NODES)
            check_fp8(runtime, ("masked",), NODES, ("grouped",))
    if rank == 0:
        path.write_text("{")  # now it is rank 0 that has none, and rank 1 that has one
    with Runtime(group, config, topology=topology) as runtime:
        assert runtime.config == config and "tuned plan" not in runtime.describe()
        check_cases(runtime, ("uniform",), NODES)
    if rank == 2:
        os.environ["COMMLIB_RING_BYTES"] = str(config.ring_bytes)  # the same number, but a plan must not replace it
    with pytest.raises(ConfigError, match=r"rank 2 has environment=\['ring_bytes'\], rank 0 has environment=\[\]"):
        Runtime(group, config, topology=topology)
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
    """A Runtime of what was tuned, in the same environment, finds it: the key holds what was measured with."""
    from mpi4py import MPI

    from commlib.cli import main

    os.environ["COMMLIB_PLANS"] = path
    assert main(["bench", "--tune", "--shapes", "64x256", "--iterations", "1", "--warmup", "1"]) == 0
    config = RuntimeConfig(hidden=256, num_experts=64, num_topk=8, max_tokens=64)
    with Runtime(MPI.COMM_WORLD, config) as runtime:
        assert "tuned plan, from rank 0's file: {" in runtime.describe()
        assert runtime.config.transport == "ucx" and runtime.config.ring_bytes == 1 << 20


def test_bench_tunes(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    results = run_ranks(
        f"{HERE}:tune_rank",
        len(NODES),
        args=[str(path)],
        ranks_per_node=2,
        env={
            "UCX_TLS": "tcp,self",
            "COMMLIB_TRANSPORT": "auto",
            "COMMLIB_NUM_THREADS": "2",
            "COMMLIB_RING_BYTES": str(1 << 20),
        },
        launcher="mpirun",
        timeout_s=200,
    )
    assert all(result.returncode == 0 for result in results), results
    assert "64 tokens x 256, top-8 of 64" in results[0].stdout and str(path) in results[0].stdout
    (entry,) = read_plans(path).entries
    assert entry.topology == {"node_sizes": [2, 2], "transport": "ucx"}
    assert entry.shape["hidden"] == 256 and entry.shape["num_threads"] == 2
    assert set(entry.plan) == {"chunk_tokens", "chunk_bytes"}


def misfit_rank(port: int) -> None:
    """Rings for which only rank 1 has no room: all ranks hear of it and go on with the next plan."""
    rank = int(os.environ["COMMLIB_RANK"])
    group = part_of_job(port, rank, len(NODES))
    config = config_of(workload_of("uniform", NODES), **FIELDS, max_arena_bytes=256 << 20)
    if rank == 1:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), resource.RLIM_INFINITY))
    with pytest.raises(CapacityError, match=r"^rank 1: cannot map"):
        Runtime(group, dataclasses.replace(config, ring_bytes=1 << 30), topology=Topology(NODES))
    with Runtime(group, config, topology=Topology(NODES)) as runtime:
        check_cases(runtime, ("uniform",), NODES)
    group.close()


def test_a_plan_without_room_on_one_rank_is_skipped_by_all() -> None:
    check_ranks(f"{HERE}:misfit_rank", len(NODES), args=[free_ports(1)[0]], env={"UCX_TLS": "tcp,self"}, timeout_s=100)
