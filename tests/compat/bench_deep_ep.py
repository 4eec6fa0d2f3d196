"""What the stand-in costs, and what it gives Megatron-Core. One JSON line per figure, from rank 0.

    torchrun --nproc-per-node 4 tests/compat/bench_deep_ep.py
    torchrun --nproc-per-node 4 tests/compat/bench_deep_ep.py --device cuda --hidden 7168 --experts 256 --topk 8

Contenders take turns; times are milliseconds of the slowest rank, median over the turns. "overhead": layout, dispatch
and combine through `deep_ep.Buffer` against dispatch and combine of the same Runtime in the same layout. "megatron":
forward and backward pass of a MoELayer with commlib against its own alltoall dispatcher, experts included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from compat.compat_job import Job, case_of, deep_ep
from compat.grouped_experts import install
from compat.megatron_job import make_layers, megatron
from torch import Tensor


def main() -> None:
    options = parse_options()
    if options.grouped:
        install()
    dist.init_process_group("gloo" if options.device == "cpu" else "cpu:gloo,cuda:nccl", timeout=timedelta(seconds=120))
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    job = Job(dist.group.WORLD, rank, size, (0,) * size, device)
    if "overhead" in options.what:
        report(job, options, "overhead", overhead(job, options), "deep_ep", "native")
    if "megatron" in options.what:
        times = layer(job, options)
        for backend in ("deepep", "hybridep"):
            report(job, options, "megatron", times, "alltoall", backend)
    dist.barrier()
    dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=("overhead", "megatron"), default=["overhead", "megatron"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, default=1024, help="per rank")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--topk", type=int, default=4)
    parser.add_argument("--expert-hidden", type=int, default=512)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--grouped", action="store_true", help="Megatron's experts in one grouped product")
    return parser.parse_args()


def overhead(job: Job, options: argparse.Namespace) -> dict[str, float]:
    case = case_of(
        job,
        "uniform",
        num_experts=options.experts,
        num_topk=options.topk,
        num_tokens=options.tokens,
        hidden=options.hidden,
    )
    x, idx = job.here(case.xs[job.rank]), job.here(case.work.topk_idx[job.rank])
    weights = job.here(case.work.topk_weights[job.rank])
    buffer = deep_ep.Buffer(job.group)

    def through_deep_ep() -> Any:
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, options.experts)
        recv, _, _, _, handle, event = buffer.dispatch(
            x,
            topk_idx=idx,
            topk_weights=weights,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            async_finish=True,
        )
        event.current_stream_wait()
        buffer.combine(recv, handle)
        return handle.runtime

    runtime = through_deep_ep()

    def native() -> None:
        got = runtime.dispatch(x, idx, weights, layout="rows")
        runtime.combine(got.x, got.handle)

    return measure(job, options.turns, {"native": native, "deep_ep": through_deep_ep})


def layer(job: Job, options: argparse.Namespace) -> dict[str, float]:
    dtype = torch.float32 if options.device == "cpu" and not options.grouped else torch.bfloat16
    settings: dict[str, Any] = {
        "hidden_size": options.hidden,
        "num_moe_experts": options.experts,
        "ffn_hidden_size": options.expert_hidden,
        "moe_ffn_hidden_size": options.expert_hidden,
        "moe_router_topk": options.topk,
        "moe_grouped_gemm": options.grouped,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
    }
    with megatron(job, 1):
        contenders: dict[str, Callable[[], Any]] = {}
        results: dict[str, tuple[Tensor, Tensor]] = {}
        given = torch.randn(options.tokens, 1, options.hidden).to(job.device, dtype)
        for name in ("alltoall", "deepep", "hybridep"):
            dispatcher = {"moe_token_dispatcher_type": "alltoall" if name == "alltoall" else "flex"}
            if name != "alltoall":
                dispatcher["moe_flex_dispatcher_backend"] = name
            module = make_layers(job, 1, 1, **settings, **dispatcher)[0]
            x = given.clone().requires_grad_()

            def step(module: Any = module, x: Any = x) -> Tensor:
                out: Tensor = module(x)[0]
                out.sum().backward()
                return out

            results[name] = step().detach(), x.grad.clone()  # type: ignore[union-attr]
            contenders[name] = step
        for name, found in results.items():
            for ours, theirs in zip(found, results["alltoall"], strict=True):
                error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
                # BF16: sums of a few partial sums, each rounded by up to 2^-9 of its size.
                assert error < (2.0**-6 if dtype == torch.bfloat16 else 2.0**-16), f"{name}: {error}"
        return measure(job, options.turns, contenders)


def measure(job: Job, turns: int, contenders: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of the slowest rank, median over the turns; two turns to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns + 2):
        for name, function in contenders.items():
            synchronize(job)
            dist.barrier()
            started = time.perf_counter()
            function()
            synchronize(job)
            elapsed = torch.tensor([time.perf_counter() - started], device=job.device)
            dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
            if turn >= 2:
                times[name].append(float(elapsed) * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


def synchronize(job: Job) -> None:
    if job.device.type == "cuda":
        torch.cuda.synchronize()


def report(job: Job, options: argparse.Namespace, what: str, times: dict[str, float], of: str, to: str) -> None:
    if job.rank == 0:
        figures = {of: round(times[of], 3), to: round(times[to], 3), "ratio": round(times[of] / times[to], 3)}
        shape = {name: getattr(options, name) for name in ("device", "tokens", "hidden", "experts", "topk")}
        print(json.dumps({"what": what, **figures, **shape, "ranks": job.size}), flush=True)


if __name__ == "__main__":
    main()
