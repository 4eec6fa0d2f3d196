"""`commlib bench --device cuda`: the GPU executor against a plain push of the same bytes, in one run.

Times are microseconds: per iteration that of the slowest rank, median and 99th percentile over iterations, with fresh
routings in turn, between CUDA events behind a device barrier. Outputs are poisoned before and compared with what they
must be after the first round of every figure. One JSON line per figure and a table, from rank 0.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from commlib import ops, routing
from commlib.bootstrap import Bootstrap, connect
from commlib.bootstrap.agreement import largest_of
from commlib.cli.bench import ring_options
from commlib.cli.nccl_baseline import NcclBaseline, open_process_group
from commlib.cli.push_limit import PushLimit
from commlib.cli.routed_rows import RoutedRows
from commlib.cli.tune import printer, tune
from commlib.config import RuntimeConfig
from commlib.cuda.engine import device_name
from commlib.cuda.heap_size import default_heap_bytes
from commlib.cuda.operations import ArenaBytes
from commlib.routing import GateConfig
from commlib.runtime import Runtime

__all__ = ["CudaBench", "run"]

_SLEEP_CYCLES = 1_600_000  # the host enqueues a whole operation meanwhile
_CHAIN = 8  # operations of the latency regime in one graph; the time of one is that of the graph divided
_PAIRS = 10  # of calls whose host time is taken together
_POISON = 0xFF  # NaN in every payload dtype


def run(arguments: argparse.Namespace, shapes: list[Any]) -> int:
    """All shapes and numbers of multiprocessors; collective."""
    boot = connect(None)
    device = torch.device("cuda", boot.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    if arguments.nccl:
        open_process_group(boot, "nccl")
    for shape in shapes:
        for num_sms in arguments.num_sms:
            bench = CudaBench(boot, device, shape, num_sms, arguments)
            if arguments.tune:
                tune(CudaTrial(bench), printer(boot.rank))
                continue
            bench.run()
            bench.print_table()
    return 0


class CudaBench:
    """One shape and one number of multiprocessors."""

    def __init__(self, boot: Bootstrap, device: Any, shape: Any, num_sms: int, arguments: argparse.Namespace) -> None:
        self.boot, self.device, self.shape, self.arguments = boot, device, shape, arguments
        self.num_sms, self.num_local_sms = num_sms, max(num_sms, arguments.num_local_sms or 0)
        self.rows = RoutedRows(boot, device, shape, arguments.workload, arguments.routings, arguments.seed)
        self.config = RuntimeConfig(
            hidden=shape.hidden,
            num_experts=shape.num_experts,
            num_topk=shape.num_topk,
            max_tokens=shape.num_tokens,
            num_sms=num_sms,
            num_local_sms=self.num_local_sms,
            decode_tokens=arguments.decode_tokens or None,
            **ring_options(arguments),
            timeout_s=20.0,
        )
        self.lines: list[dict[str, Any]] = []
        self.network: Any = None
        self._limit_rate = float("nan")  # bytes per microsecond

    def run(self) -> None:
        with Runtime(self.boot, self.config, device=self.device) as runtime:
            self.runtime: Runtime = runtime
            self.executor: Any = runtime._executor
            self._measure_limit()
            if runtime.topology.num_nodes > 1:
                from commlib.cli.network_limit import NetworkLimit  # here: one node needs no native core

                num_rows = self.rows.rows_per_node(runtime.topology)
                self.network = NetworkLimit(self.boot, runtime, self.executor, num_rows)
            for layout, fp8 in (("grouped", None), ("rows", None), ("grouped", "pow2"), ("rows", "pow2")):
                self._dispatch(layout, fp8)
            self._combine("grouped", is_weighted=True)
            self._combine("rows", is_weighted=False)
            if self.arguments.nccl:
                self._nccl()
            self._gate()
            self._host_times()
            if self.arguments.decode_tokens:
                self._latency()
            memory = runtime.memory()._asdict()
            self._report(what="memory", **memory)

    def seconds(self) -> float:
        """Dispatch and combine, layout "grouped", BF16."""
        rows = self.rows
        with Runtime(self.boot, self.config, device=self.device) as runtime:

            def both(which: int) -> Any:
                got = runtime.dispatch(rows.own(), rows.choices(which), rows.weights)
                return runtime.combine(got.x, got.handle, weights=got.row_weights)

            self.runtime, self.executor = runtime, runtime._executor
            return float(self._timed(both, None)["us"]) / 1e6

    # ---- figures

    def _measure_limit(self) -> None:
        limit = PushLimit(self.executor, self.rows.own(), self.num_sms)
        if not limit.has_peers:
            return
        num_rows = max(self.rows.num_remote_rows)
        for way in limit.ways():
            prepared = limit.prepare(num_rows, way)
            times = self._timed(partial(_push, limit, prepared), None)
            rows = limit.pushed_rows(num_rows)
            rate = rows * self.shape.hidden * 2 / times["us"]
            self._report(what="push_limit", way=way.name, rows=rows, gb_s=round(rate / 1e3, 1), **times)
            if not rate <= self._limit_rate:
                self._limit_rate = rate

    def _dispatch(self, layout: str, fp8: str | None) -> None:
        rows = self.rows

        def call(which: int) -> Any:
            return self.runtime.dispatch(rows.own(), rows.choices(which), rows.weights, layout=layout, fp8=fp8)

        times = self._timed(call, lambda which, got: rows.check_dispatched(which, got, layout, fp8, self.config))
        self._report_rows("dispatch", times, 1 if fp8 else 2, layout=layout, dtype="fp8" if fp8 else "bf16")

    def _combine(self, layout: str, *, is_weighted: bool) -> None:
        rows = self.rows
        got = self.runtime.dispatch(rows.own(), rows.choices(0), rows.weights, layout=layout)
        y, weights = got.x.clone(), got.row_weights if is_weighted else None

        def call(_: int) -> Any:
            return self.runtime.combine(y, got.handle, weights=weights)

        times = self._timed(call, lambda _, result: self._check_combined(rows, result, layout, is_weighted))
        self._report_rows("combine", times, 2, layout=layout, dtype="bf16", weighted=is_weighted)

    def _nccl(self) -> None:
        baseline = NcclBaseline(self.rows, self.shape.num_experts, self.config.expert_alignment)
        for which in range(self.rows.num_routings):
            got = baseline.check(which, self.config)
        times = self._timed(baseline.dispatch, None)
        self._report_rows("nccl dispatch", times, 2, layout="grouped", dtype="bf16")
        times = self._timed(lambda _: baseline.combine(got), None)
        self._report_rows("nccl combine", times, 2, layout="grouped", dtype="bf16", weighted=True)

    def _gate(self) -> None:
        """Fused against the composition of torch operations: sigmoid, bias, 4 of 8 groups, top-k, normalised."""
        shape = self.shape
        if shape.num_experts % 8 or shape.num_topk > shape.num_experts // 2:
            return
        config = GateConfig(
            num_experts=shape.num_experts, num_topk=shape.num_topk, num_groups=8, max_groups=4, route_scale=2.5
        )
        generator = torch.Generator(device=self.device).manual_seed(1)
        logits = torch.randn(shape.num_tokens, shape.num_experts, generator=generator, device=self.device)
        bias = torch.randn(shape.num_experts, generator=generator, device=self.device) / 20
        with torch.no_grad():
            got = ops.gate(logits, config, bias)
            assert torch.equal(got.topk_idx, routing.select_experts(got.scores, config, bias)), "gate"
            graph: Any = torch.cuda.CUDAGraph()
            self._align()
            with torch.cuda.graph(graph):
                for _ in range(_CHAIN):
                    ops.gate(logits, config, bias)
            times = self._timed(partial(_replay, graph), None)
            each = {key: round(value / _CHAIN, 1) for key, value in times.items()}
            self._report(what="gate", chain=_CHAIN, checked=True, **each)
            times = self._timed(lambda _: routing.gate(logits, config, bias), None)
            self._report(what="gate of torch operations", checked=True, **times)

    def _host_times(self) -> None:
        """Host clock: a call until its sizes are known and all is done; then calls that nobody waits for, several pairs
        behind one another, per call."""
        capacity = self.rows.most_rows(self.config.expert_alignment)
        # Calls with a capacity cannot make room: the rows of whoever gets most, on all ranks.
        usual = default_heap_bytes(self.config, self.boot.size, self.runtime.topology.num_nodes)
        config = replace(self.config, arena_bytes=usual + capacity * (2 * self.shape.hidden + 4))
        with Runtime(self.boot, config, device=self.device) as runtime:
            self._time_host(runtime, capacity)

    def _time_host(self, runtime: Runtime, capacity: int) -> None:
        rows = self.rows
        whole, dispatch, combine = [], [], []
        for iteration in range(self.arguments.warmup + self.arguments.iterations):
            which = iteration % rows.num_routings
            x, idx, weights = rows.own(), rows.choices(which), rows.weights
            self._align()
            begin = time.perf_counter()
            got = runtime.dispatch(x, idx, weights)
            torch.cuda.synchronize()
            whole.append(self._slowest(time.perf_counter() - begin))
            del got
            self._align()
            spent = [0.0, 0.0]
            for _ in range(_PAIRS):
                begin = time.perf_counter()
                got = runtime.dispatch(x, idx, weights, capacity=capacity)
                middle = time.perf_counter()
                runtime.combine(got.x, got.handle, weights=got.row_weights)
                spent[0] += middle - begin
                spent[1] += time.perf_counter() - middle
                del got
            dispatch.append(self._slowest(spent[0] / _PAIRS))
            combine.append(self._slowest(spent[1] / _PAIRS))
        runtime.check()
        for name, seconds in (("end to end", whole), ("host dispatch", dispatch), ("host combine", combine)):
            counted = 1e6 * np.array(seconds[self.arguments.warmup :])
            self._report(
                what=name, us=round(float(np.median(counted)), 1), us_p99=round(float(np.quantile(counted, 0.99)), 1)
            )

    def _latency(self) -> None:
        """Few tokens: graphs of several dispatches (FP8 rows), and of several combines (BF16), replayed."""
        arguments, runtime = self.arguments, self.runtime
        shape = self.shape._replace(num_tokens=arguments.decode_tokens)
        rows = RoutedRows(self.boot, self.device, shape, arguments.workload, 1, arguments.seed)

        def dispatch() -> Any:
            return runtime.dispatch(
                rows.own(), rows.choices(0), rows.weights, regime="latency", fp8="pow2", expert_alignment=1
            )

        got = runtime.dispatch(rows.own(), rows.choices(0), rows.weights, regime="latency", expert_alignment=1)
        y = got.x.clone()

        def combine() -> Any:
            return runtime.combine(y, got.handle, weights=got.row_weights)

        for name, call in (("decode dispatch fp8", dispatch), ("decode combine bf16", combine)):
            call()
            self._align()
            graph: Any = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = [call() for _ in range(_CHAIN)]
            times = self._timed(partial(_replay, graph), None)
            self._align()
            for result in results:
                result.x.view(torch.uint8).fill_(_POISON)
            self._align()
            graph.replay()
            for result in results:
                if name.startswith("decode dispatch"):
                    rows.check_counted(0, result, "pow2")
                else:
                    self._check_combined(rows, result, "grouped", True)
            each = {key: round(value / _CHAIN, 1) for key, value in times.items()}
            self._report(what=name, decode_tokens=arguments.decode_tokens, chain=_CHAIN, checked=True, **each)

    # ---- how

    def _align(self) -> None:
        torch.cuda.synchronize()
        self.boot.barrier(60)

    def _timed(self, call: Callable[[int], Any], check: Callable[[int, Any], None] | None) -> dict[str, float]:
        """Runs `call(which routing)`; the first round warms up and is checked."""
        times: list[float] = []
        kernels: dict[str, list[float]] = {}
        executor, num_routings = self.executor, self.rows.num_routings
        for iteration in range(num_routings + self.arguments.iterations):
            which, is_counted = iteration % num_routings, iteration >= num_routings
            if not is_counted and check is not None:
                self._poison()
            self._align()
            torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
            executor.enqueue_barrier(is_lazy=True)
            executor.marks = []
            new_event: Any = torch.cuda.Event
            start = torch.cuda.current_stream().record_event(new_event(enable_timing=True))
            result = call(which)
            end = torch.cuda.current_stream().record_event(new_event(enable_timing=True))
            torch.cuda.synchronize()
            marks, executor.marks = executor.marks, None
            if is_counted:
                times.append(self._slowest(1000 * start.elapsed_time(end)))
                for name, begin, finish in marks:
                    kernels.setdefault(name, []).append(self._slowest(1000 * begin.elapsed_time(finish)))
            elif check is not None:
                check(which, result)
            del result
        figures = {"us": float(np.median(times)), "us_p99": float(np.quantile(times, 0.99))}
        figures |= {f"us_{name}": float(np.median(each)) for name, each in kernels.items()}
        return {name: round(value, 1) for name, value in figures.items()}

    def _poison(self) -> None:
        """Nothing that an operation should have written looks right if it has not."""
        slab = self.executor.arena.heap.take_largest()
        torch.as_tensor(ArenaBytes(slab.address, slab.num_bytes, slab), device=self.device).fill_(_POISON)
        # What torch keeps for results of this size.
        size = 2 * self.shape.num_tokens * self.shape.hidden
        kept = [torch.full((size,), _POISON, dtype=torch.uint8, device=self.device) for _ in range(2)]
        del kept
        self._align()

    def _slowest(self, value: float) -> float:
        return largest_of(self.boot, value, timeout_s=60)

    def _check_combined(self, rows: RoutedRows, result: Any, layout: str, is_weighted: bool) -> None:
        rows.check_combined(0, result.x, layout, self.runtime.topology, is_weighted=is_weighted)

    def _report_rows(self, what: str, times: dict[str, float], element_bytes: int, **values: Any) -> None:
        """The bytes of the rank that sends most, mean over routings; between nodes those that cross the network."""
        if self.network is not None:
            scales = 4 * (self.shape.hidden // 128) if element_bytes == 1 else 0
            row_bytes = self.shape.hidden * element_bytes + scales
            moved, put_us = self.network.measure(row_bytes, is_combine="combine" in what)
            share = {"put_us": round(put_us, 1), "of_put_limit": round(put_us / times["us"], 3)}
        else:
            moved = float(np.mean(self.rows.num_remote_rows)) * self.shape.hidden * element_bytes
            has_limit = self._limit_rate > 0  # not where no row goes to another rank
            share = {"of_push_limit": round(moved / times["us"] / self._limit_rate, 3) if has_limit else None}
        self._report(what=what, **values, checked=True, gb_s=round(moved / times["us"] / 1e3, 1), **share, **times)

    def _report(self, **values: Any) -> None:
        if self.boot.rank != 0:
            return
        line = {**values, **self.shape._asdict(), "num_ranks": self.boot.size, "workload": self.arguments.workload}
        if self.network is not None:
            line |= {"chunk_bytes": self.runtime.config.chunk_bytes, "ring_bytes": self.runtime.config.ring_bytes}
        line |= {
            "sms": self.num_sms,
            "local_sms": self.num_local_sms,
            "device": torch.cuda.get_device_name(self.device),
        }
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        if self.arguments.json is not None:
            with open(self.arguments.json, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def print_table(self) -> None:
        """Rank 0's lines for people."""
        if not self.lines:
            return
        shape = self.shape
        local = f" (+ local work on {self.num_local_sms})" if self.num_local_sms != self.num_sms else ""
        print(
            f"\n{self.boot.size} GPUs, {shape.num_tokens} tokens x {shape.hidden}, top-{shape.num_topk} of "
            f"{shape.num_experts}, {self.num_sms} SMs{local}, us"
        )
        for line in self.lines:
            if "us" not in line:
                continue
            name = " ".join(str(line[key]) for key in ("what", "way", "layout", "dtype") if key in line)
            share = f"  {line['gb_s']:7.1f} GB/s" if "gb_s" in line else ""
            for limit in ("push", "put"):
                part = line.get(f"of_{limit}_limit")
                share += "" if part is None else f"  {part:.2f} of the {limit} limit"
            print(f"  {name:<28} median {line['us']:8.1f}  p99 {line['us_p99']:8.1f}{share}")
        print(flush=True)


class CudaTrial:
    """See `tune.Trial`."""

    def __init__(self, bench: CudaBench) -> None:
        self._bench, self.rank = bench, bench.boot.rank
        self.device = device_name(bench.device)
        with Runtime(bench.boot, replace(bench.config, use_tuned_plan=False), device=bench.device) as runtime:
            self.config, self.topology = runtime.config, runtime.topology

    def seconds(self, config: RuntimeConfig) -> float:
        self._bench.config = config
        return self._bench.seconds()


def _push(limit: PushLimit, prepared: Any, _: int) -> None:
    limit.push(prepared)


def _replay(graph: Any, _: int) -> None:
    graph.replay()
