"""Times of the GPU executor against a plain push of the same bytes, in one run. One JSON line per figure, from rank 0.

    mpirun -n 4 python tests/gpu/bench_cuda.py --num-sms 16 24

Times are microseconds of the slowest rank, median over fresh routings, between CUDA events; every measured operation
starts behind a device barrier. Results are compared with the expected ones in the same run, outside the timed part.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_job import join

from commlib.config import RuntimeConfig
from commlib.cuda.compile import compile_unit, default_cache
from commlib.cuda.driver import load_kernels
from commlib.cuda.engine import CudaEngine
from commlib.cuda.launch import MAX_SHARED_BYTES, Tuning, push_limit_bytes
from commlib.cuda.params import PushLimitCall
from commlib.testing.workloads import make_workload

SLEEP_CYCLES = 1_600_000  # the host enqueues a whole operation meanwhile


def poison(engine: CudaEngine) -> None:
    """Nothing that an operation should have written looks right if it has not."""
    slab = engine.arena.heap.take_largest()
    engine._view(slab, 0, torch.uint8, (slab.num_bytes,)).fill_(0xFF)
    torch.cuda.synchronize()
    engine.boot.barrier(60)


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.boot, self.device = join()
        self.options = options
        ranks = self.boot.size
        self.works = [
            make_workload(
                options.workload, num_ranks=ranks, num_experts=options.experts, num_topk=options.topk,
                num_tokens=options.tokens, seed=seed,
            )
            for seed in range(options.routings)
        ]  # fmt: skip
        # Every rank can make every other rank's rows: that is how results are checked.
        self.xs = [self._rows(rank) for rank in range(ranks)]
        self.idx = [[idx.to(self.device) for idx in work.topk_idx] for work in self.works]
        rank = self.boot.rank
        self.weights = torch.full((options.tokens, options.topk), 0.125, device=self.device)
        per_rank = options.experts // ranks
        self.remote_rows = [
            sum(
                int(((work.topk_idx[rank] // per_rank) == peer).any(dim=1).sum())
                for peer in range(ranks)
                if peer != rank
            )
            for work in self.works
        ]
        self.limit = load_kernels(compile_unit("push_limit", default_cache())[0], {"push_limit": MAX_SHARED_BYTES})

    def _rows(self, rank: int) -> Any:
        generator = torch.Generator(device=self.device).manual_seed(rank)
        shape = (self.options.tokens, self.options.hidden)
        return torch.randn(shape, generator=generator, device=self.device).to(torch.bfloat16)

    def slowest(self, value: float) -> float:
        return max(json.loads(text) for text in self.boot.allgather(json.dumps(value).encode(), timeout_s=60))

    def report(self, **values: Any) -> None:
        if self.boot.rank == 0:
            print(json.dumps(values), flush=True)

    def timed(
        self, engine: CudaEngine, run: Callable[[int], Any], check: Callable[[int, Any], None] | None
    ) -> dict[str, float]:
        """Runs every routing `repeats` times; medians over iterations of the slowest rank."""
        whole, kernels = [], {}
        for iteration in range(self.options.repeats * len(self.works)):
            which = iteration % len(self.works)
            if check is not None and iteration < len(self.works):
                poison(engine)
            torch.cuda.synchronize()
            self.boot.barrier(60)
            torch.cuda._sleep(SLEEP_CYCLES)
            engine.barrier_send()
            engine.marks = []
            # The barrier ends on the engine's stream: time from there.
            start = engine._stream.record_event(torch.cuda.Event(enable_timing=True))
            result = run(which)
            end = torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
            torch.cuda.synchronize()
            marks, engine.marks = engine.marks, None
            if iteration >= len(self.works):  # the first round warms up
                whole.append(self.slowest(1000 * start.elapsed_time(end)))
                for name, begin, finish in marks:
                    kernels.setdefault(name, []).append(self.slowest(1000 * begin.elapsed_time(finish)))
            if check is not None and iteration < len(self.works):
                check(which, result)
            del result
        times = {"us": round(statistics.median(whole), 1), "us_max": round(max(whole), 1)}
        return times | {f"us_{name}": round(statistics.median(each), 1) for name, each in kernels.items()}

    # ---- what is measured

    def push_limit(self, engine: CudaEngine, num_sms: int) -> None:
        ranks, rank, row_bytes = self.boot.size, self.boot.rank, 2 * self.options.hidden
        per_peer = int(self.slowest(max(self.remote_rows))) // max(1, ranks - 1)
        for warps, piece in ((7, row_bytes // 2), (14, row_bytes // 4)):
            call = PushLimitCall(
                rows=self.xs[rank].data_ptr(),
                num_peers=ranks - 1,
                num_rows=per_peer,
                row_bytes=row_bytes,
                piece_bytes=piece,
            )
            for place, peer in enumerate(p for p in range(ranks) if p != rank):
                first = engine.arena.base[peer] + engine.arena.regions.total_bytes
                call.landing[place] = first + rank * per_peer * row_bytes

            def run(_: int, call: Any = call, warps: int = warps, piece: int = piece) -> None:
                stream = engine._stream
                shared = push_limit_bytes(warps, piece)
                self.limit["push_limit"].launch(stream.cuda_stream, num_sms, 32 * warps, shared, call)
                torch.cuda.current_stream().wait_stream(stream)

            times = self.timed(engine, run, None)
            gb_s = per_peer * (ranks - 1) * row_bytes / times["us"] / 1e3
            self.report(
                what="push_limit", sms=num_sms, warps=warps, rows=per_peer * (ranks - 1), gb_s=round(gb_s, 1), **times
            )

    def dispatch(self, engine: CudaEngine, layout: str, fp8: str | None, **extra: Any) -> None:
        rank = self.boot.rank

        def run(which: int) -> Any:
            return engine.dispatch(self.xs[rank], self.idx[which][rank], self.weights, layout=layout, fp8=fp8)

        check = self.check_grouped if layout == "grouped" and fp8 is None else None
        times = self.timed(engine, run, check)
        row_bytes = self.options.hidden * (1 if fp8 else 2)
        gb_s = statistics.mean(self.remote_rows) * row_bytes / times["us"] / 1e3
        self.report(
            what="dispatch", layout=layout, fp8=fp8, checked=check is not None, gb_s=round(gb_s, 1), **extra, **times
        )

    def combine(self, engine: CudaEngine, **extra: Any) -> None:
        rank = self.boot.rank
        got = [
            engine.dispatch(self.xs[rank], self.idx[which][rank], self.weights, layout="grouped") for which in range(1)
        ]

        def run(_: int) -> Any:
            return engine.combine(got[0].x, got[0].handle, weights=got[0].row_weights)

        times = self.timed(engine, run, lambda _, result: self.check_combined(0, result))
        gb_s = statistics.mean(self.remote_rows) * 2 * self.options.hidden / times["us"] / 1e3
        self.report(
            what="combine", layout="grouped", weighted=True, checked=True, gb_s=round(gb_s, 1), **extra, **times
        )

    def end_to_end(self, engine: CudaEngine) -> None:
        """Host clock from the call to sizes known and everything done."""
        rank, seconds = self.boot.rank, []
        for iteration in range(12):
            torch.cuda.synchronize()
            self.boot.barrier(60)
            begin = time.perf_counter()
            result = engine.dispatch(self.xs[rank], self.idx[iteration % len(self.works)][rank], self.weights)
            called = time.perf_counter()
            torch.cuda.synchronize()
            seconds.append((self.slowest(time.perf_counter() - begin), self.slowest(called - begin)))
            del result
        ends, calls = zip(*seconds[2:], strict=True)
        self.report(
            what="dispatch end to end", us=round(1e6 * statistics.median(ends), 1),
            us_call=round(1e6 * statistics.median(calls), 1),
        )  # fmt: skip

    def profile(self, engine: CudaEngine) -> None:
        """Where the host spends its time, on rank 0."""
        rank = self.boot.rank
        profiler = cProfile.Profile()
        for iteration in range(120):
            if iteration == 20:
                profiler.enable()
            got = engine.dispatch(self.xs[rank], self.idx[0][rank], self.weights)
            engine.combine(got.x, got.handle, weights=got.row_weights)
            del got
        profiler.disable()
        if rank == 0:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(28)

    # ---- what is expected

    def check_grouped(self, which: int, got: Any) -> None:
        ranks, rank, alignment = self.boot.size, self.boot.rank, 128
        per_rank = self.options.experts // ranks
        row = 0
        for local in range(per_rank):
            begin = row
            for source in range(ranks):
                tokens = (self.idx[which][source] == rank * per_rank + local).any(dim=1).nonzero()[:, 0]
                assert torch.equal(got.x[row : row + len(tokens)], self.xs[source][tokens]), (local, source)
                row += len(tokens)
            end = begin + -(-(row - begin) // alignment) * alignment
            assert int((got.x[row:end] != 0).sum()) == 0 and int((got.row_weights[row:end] != 0).sum()) == 0
            assert bool((got.row_weights[begin:row] == 0.125).all())
            row = end
        assert row == got.x.shape[0]

    def check_combined(self, which: int, got: Any) -> None:
        """Copies of one row times 1/8 add up exactly in FP32, so plain sums say what every rounding must give."""
        ranks, rank = self.boot.size, self.boot.rank
        owner = self.idx[which][rank] // (self.options.experts // ranks)
        x = self.xs[rank].float()
        total = torch.zeros_like(x)
        for peer in range(ranks):
            total += ((owner == peer).sum(dim=1)[:, None] * x / 8).to(torch.bfloat16).float()
        assert torch.equal(got.x, total.to(torch.bfloat16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--workload", default="uniform")
    parser.add_argument("--routings", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--num-sms", type=int, nargs="+", default=[16, 24])
    parser.add_argument(
        "--tunings",
        nargs="*",
        default=["14,7,12,15,3"],
        help="dispatch warps, push warps, busy push warps, combine warps, final warps",
    )
    parser.add_argument("--profile", action="store_true", help="show where the host spends its time")
    parser.add_argument("--only-plain", action="store_true", help="grouped dispatch and combine only")
    options = parser.parse_args()
    bench = Bench(options)
    config = RuntimeConfig(
        hidden=options.hidden,
        num_experts=options.experts,
        num_topk=options.topk,
        max_tokens=options.tokens,
        timeout_s=5.0,
    )
    for num_sms in options.num_sms:
        for number, text in enumerate(options.tunings):
            names = ("dispatch_warps", "push_warps", "busy_push_warps", "combine_warps", "final_warps")
            tuning = Tuning(**dict(zip(names, map(int, text.split(",")), strict=True)))
            engine = CudaEngine(bench.boot, config, device=bench.device, num_sms=num_sms, tuning=tuning)
            extra = {"sms": num_sms, "tuning": text}
            if number == 0:
                bench.push_limit(engine, num_sms)
            bench.dispatch(engine, "grouped", None, **extra)
            bench.combine(engine, **extra)
            if number == 0 and not options.only_plain:
                bench.dispatch(engine, "rows", None, **extra)
                bench.dispatch(engine, "grouped", "fp32", **extra)
                bench.dispatch(engine, "grouped", "pow2", **extra)
                bench.dispatch(engine, "rows", "pow2", **extra)
                bench.end_to_end(engine)
            if number == 0 and options.profile:
                bench.profile(engine)
            engine.close()
    bench.report(what="done", device=torch.cuda.get_device_name(), ranks=bench.boot.size)


if __name__ == "__main__":
    main()
