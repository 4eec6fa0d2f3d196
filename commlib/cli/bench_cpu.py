"""`commlib bench --device cpu`: the CPU executor against Alltoallv with numpy, memcpy and plain puts.

Every contender does each iteration in turn (interleaved); an iteration's time is that of the slowest rank, the figure
is the median over iterations. Rank 0 prints one JSON line per contender and a table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from commlib.bootstrap import connect
from commlib.cli.baselines import AlltoallvExchange, memcpy_seconds
from commlib.cli.bench import Shape, ring_options
from commlib.cli.put_limit import PutLimit, put_ways
from commlib.cli.tune import printer, tune
from commlib.config import RuntimeConfig
from commlib.errors import ConfigError
from commlib.runtime import Runtime

__all__ = ["run"]


def run(arguments: argparse.Namespace, shapes: list[Shape]) -> int:
    try:
        from mpi4py import MPI
    except ImportError:
        raise ConfigError("commlib bench runs under mpirun and needs mpi4py, for the baseline") from None
    comm = MPI.COMM_WORLD
    for shape in shapes:
        if arguments.tune:
            show = printer(comm.rank)
            show(f"{shape.num_tokens} tokens x {shape.hidden}, top-{shape.num_topk} of {shape.num_experts}")
            tune(CpuTrial(comm, shape, arguments), show)
            continue
        lines = _Bench(comm, shape, arguments).run()
        if comm.rank == 0:
            _print(shape, lines, arguments.json)
    return 0


class _Inputs(NamedTuple):
    x: npt.NDArray[np.float32]
    topk_idx: npt.NDArray[np.int64]
    topk_weights: npt.NDArray[np.float32]


def _make_inputs(shape: Shape, runtime: Runtime, max_nodes: int | None, seed: int) -> _Inputs:
    """Uniform random routing; with `max_nodes`, experts are drawn from that many random nodes per token."""
    random = np.random.default_rng([seed, runtime.rank])
    scores = random.random((shape.num_tokens, shape.num_experts))
    if max_nodes is not None:
        topology = runtime.topology
        node_of_expert = np.array(topology.node_of_expert(shape.num_experts))
        node_rank = random.random((shape.num_tokens, topology.num_nodes)).argsort(axis=1).argsort(axis=1)
        scores[node_rank[:, node_of_expert] >= max_nodes] -= 1
    topk_idx = np.argsort(-scores, axis=1)[:, : shape.num_topk].astype(np.int64)
    weights = random.random((shape.num_tokens, shape.num_topk), dtype=np.float32)
    x = random.standard_normal((shape.num_tokens, shape.hidden), dtype=np.float32)
    return _Inputs(x, topk_idx, weights)


def _config_of(shape: Shape, arguments: argparse.Namespace) -> RuntimeConfig:
    return RuntimeConfig(
        hidden=shape.hidden,
        num_experts=shape.num_experts,
        num_topk=shape.num_topk,
        max_tokens=shape.num_tokens,
        expert_alignment=1,
        num_threads=arguments.threads,
        **ring_options(arguments),
    )


class CpuTrial:
    """See `tune.Trial`."""

    device = "cpu"

    def __init__(self, comm: Any, shape: Shape, arguments: argparse.Namespace) -> None:
        self._comm, self._shape, self._arguments = comm, shape, arguments
        self.rank: int = comm.rank
        with Runtime(comm, replace(_config_of(shape, arguments), use_tuned_plan=False)) as runtime:
            self.config, self.topology = runtime.config, runtime.topology
            self.inputs = _make_inputs(shape, runtime, arguments.max_nodes, arguments.seed)

    def seconds(self, config: RuntimeConfig) -> float:
        x, topk_idx, topk_weights = self.inputs
        times = []
        with Runtime(self._comm, config) as runtime:
            for _ in range(self._arguments.warmup + self._arguments.iterations):
                self._comm.Barrier()
                begin = time.perf_counter()
                d = runtime.dispatch(x, topk_idx, topk_weights)
                runtime.combine(d.x, d.handle, weights=d.row_weights)
                times.append(time.perf_counter() - begin)
        slowest = np.array(self._comm.allgather(times[self._arguments.warmup :])).max(axis=0)
        return float(np.median(slowest))


class _Bench:
    """One shape: all contenders, interleaved."""

    def __init__(self, comm: Any, shape: Shape, arguments: argparse.Namespace) -> None:
        self.comm = comm
        self.shape = shape
        self.arguments = arguments
        self.boot = connect(comm)
        self.runtime = Runtime(self.boot, _config_of(shape, arguments))
        self.inputs = _make_inputs(shape, self.runtime, arguments.max_nodes, arguments.seed)
        self.baseline = AlltoallvExchange(comm, shape.num_experts)
        self.times: dict[str, list[float]] = {}

    def run(self) -> list[dict[str, Any]]:
        with self.runtime:
            self._check_results()
            before = self.runtime.counters()
            self._commlib()
            bytes_moved = _difference(self.runtime.counters(), before)
            lower_bound = self._lower_bound_bytes()
            limits = self._put_limits(lower_bound)
            for iteration in range(self.arguments.warmup + self.arguments.iterations):
                is_counted = iteration >= self.arguments.warmup
                self._commlib(is_counted)
                self._alltoallv(is_counted)
                self._timed("memcpy", is_counted, lambda: memcpy_seconds(bytes_moved["written"], 4 * self.shape.hidden))
                for name, limit in limits.items():
                    self._record(f"put_{name}_dispatch", is_counted, limit.seconds(is_combine=False))
                    self._record(f"put_{name}_combine", is_counted, limit.seconds(is_combine=True))
            memory = self.runtime.memory()
            for limit in limits.values():
                limit.close()
        return self._lines(bytes_moved, lower_bound, memory._asdict())

    def _put_limits(self, lower_bound: list[int]) -> dict[str, PutLimit]:
        if self.runtime.topology.num_nodes == 1:
            return {}
        ways = put_ways(self.runtime.config)
        return {name: PutLimit(self.boot, self.runtime, lower_bound, *way) for name, way in ways.items()}

    def _timed(self, name: str, is_counted: bool, call: Callable[[], Any]) -> Any:
        self.comm.Barrier()
        begin = time.perf_counter()
        result = call()
        self._record(name, is_counted, time.perf_counter() - begin)
        return result

    def _record(self, name: str, is_counted: bool, seconds: float) -> None:
        if is_counted:
            self.times.setdefault(name, []).append(seconds)

    def _commlib(self, is_counted: bool = False) -> Any:
        runtime, (x, topk_idx, topk_weights) = self.runtime, self.inputs
        d = self._timed("dispatch", is_counted, lambda: runtime.dispatch(x, topk_idx, topk_weights))
        return d, self._timed("combine", is_counted, lambda: runtime.combine(d.x, d.handle, weights=d.row_weights)).x

    def _alltoallv(self, is_counted: bool = False) -> Any:
        x, topk_idx, topk_weights = self.inputs
        routed = self._timed("alltoallv_dispatch", is_counted, lambda: self.baseline.dispatch(x, topk_idx))
        out = self._timed(
            "alltoallv_combine", is_counted, lambda: self.baseline.combine(routed.rows, routed, topk_weights)
        )
        return routed, out

    def _check_results(self) -> None:
        """Both contenders give the same rows, and the same sums up to FP32 summation order."""
        (d, out), (routed, expected) = self._commlib(), self._alltoallv()
        if not np.array_equal(d.x, routed.rows):
            raise AssertionError(f"rank {self.comm.rank}: dispatched rows differ from the baseline's")
        # Either sum of k products has relative error at most k * 2^-24 (1 + ...) of the sum of magnitudes.
        magnitude = np.abs(self.inputs.x) * self.inputs.topk_weights.sum(axis=1, keepdims=True)
        bound = 2 * (self.shape.num_topk + 1) * 2.0**-24 * magnitude
        if not (np.abs(out - expected) <= bound).all():
            raise AssertionError(f"rank {self.comm.rank}: combined sums differ from the baseline's beyond rounding")

    def _lower_bound_bytes(self) -> list[int]:
        """[node] bytes of one copy of each own token per remote node that has an expert of it."""
        topology, rank = self.runtime.topology, self.runtime.rank
        nodes = np.array(topology.node_of_expert(self.shape.num_experts))[self.inputs.topk_idx]
        return [
            0 if node == topology.node(rank) else int((nodes == node).any(axis=1).sum()) * self.shape.hidden * 4
            for node in range(topology.num_nodes)
        ]

    def _lines(
        self, bytes_moved: dict[str, int], lower_bound: list[int], memory: dict[str, int]
    ) -> list[dict[str, Any]]:
        facts = {
            **self.shape._asdict(),
            "num_ranks": self.comm.size,
            "num_nodes": self.runtime.topology.num_nodes,
            "threads": self.arguments.threads,
            "chunk_bytes": self.runtime.config.chunk_bytes,
            "ring_bytes": self.runtime.config.ring_bytes,
        }
        lines = []
        for name, seconds in self.times.items():
            slowest = np.array(self.comm.allgather(seconds)).max(axis=0)
            lines.append(
                {
                    "name": name,
                    "median_ms": round(float(np.median(slowest)) * 1e3, 3),
                    "min_ms": round(float(slowest.min()) * 1e3, 3),
                    "max_ms": round(float(slowest.max()) * 1e3, 3),
                    **facts,
                }
            )
        moved = {f"{key}_bytes": max(self.comm.allgather(value)) for key, value in bytes_moved.items()}
        bound = max(self.comm.allgather(sum(lower_bound)))
        registered = max(self.comm.allgather(memory["registered_bytes"]))
        lines.append({"name": "bytes", **moved, "lower_bound_bytes": bound, "registered_bytes": registered, **facts})
        return lines


def _difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, int]:
    """Bytes that the roles wrote and read, and payload bytes posted, between two readings."""

    def total(counters: dict[str, Any], key: str) -> int:
        return sum(int(role[key]) for role in counters["roles"].values())

    return {
        "written": total(after, "bytes_written") - total(before, "bytes_written"),
        "read": total(after, "bytes_read") - total(before, "bytes_read"),
        "payload": int(after["payload_bytes"]) - int(before["payload_bytes"]),
    }


def _print(shape: Shape, lines: list[dict[str, Any]], path: str | None) -> None:
    for line in lines:
        print(json.dumps(line))
    if path is not None:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    medians = {line["name"]: line["median_ms"] for line in lines if "median_ms" in line}
    ours = medians["dispatch"] + medians["combine"]
    theirs = medians["alltoallv_dispatch"] + medians["alltoallv_combine"]
    routing = f"top-{shape.num_topk} of {shape.num_experts}"
    print(f"\n{shape.num_tokens} tokens x {shape.hidden}, {routing} (ms, slowest rank)")
    print(f"  commlib    dispatch {medians['dispatch']:9.2f}  combine {medians['combine']:9.2f}  sum {ours:9.2f}")
    print(
        f"  Alltoallv  dispatch {medians['alltoallv_dispatch']:9.2f}  "
        f"combine {medians['alltoallv_combine']:9.2f}  sum {theirs:9.2f}  = {theirs / ours:.2f} x commlib"
    )
    copy = medians["memcpy"]
    print(f"  memcpy of the bytes that the roles write: {copy:9.2f}, commlib = {ours / copy:.2f} x")
    for way in ("chunk", "large"):
        if f"put_{way}_dispatch" in medians:
            out, home = medians[f"put_{way}_dispatch"], medians[f"put_{way}_combine"]
            print(
                f"  put ({way})  dispatch {out:7.2f}  combine {home:9.2f}  sum {out + home:9.2f}  "
                f"= {(out + home) / ours:.2f} of commlib's time (our goodput / its goodput)"
            )
    print(flush=True)
