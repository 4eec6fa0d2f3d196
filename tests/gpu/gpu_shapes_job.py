"""Shapes and orders of calls at the edges of the GPU executor, against the oracle."""

from __future__ import annotations

import pytest
import torch
from gpu.gpu_job import case_of, join, open_runtime
from gpu.gpu_modes_job import check_latency
from row_cases import assert_bits

from commlib import reference
from commlib.errors import ConfigError
from commlib.runtime import Runtime
from commlib.testing.workloads import Workload, make_workload


def _work(num_ranks: int, num_topk: int, num_tokens: int, seed: int = 0, num_experts: int = 24) -> Workload:
    return make_workload(
        "uniform", num_ranks=num_ranks, num_experts=num_experts, num_topk=num_topk, num_tokens=num_tokens, seed=seed
    )


def shapes_rank() -> None:
    """Many short rows by few blocks, so that every warp has long runs of one-piece rows; wide routings; more blocks for
    local work than for the wire."""
    boot, device = join()
    for num_topk, num_tokens, hidden, options in (
        (1, 4096, 256, {"num_sms": 4}),
        (1, 4096, 256, {"num_sms": 1}),
        (8, 512, 512, {"num_sms": 4, "num_local_sms": 12}),
        (8, 300, 7168, {"num_sms": 8}),
        (24, 40, 256, {"num_sms": 4, "num_local_sms": 5}),
    ):
        work = _work(boot.size, num_topk, num_tokens)
        with open_runtime(boot, device, work, hidden, max_tokens=num_tokens, **options) as runtime:
            for layout in ("grouped", "rows"):
                for fp8 in (None, "pow2"):
                    case = case_of(work, layout, 8, hidden, torch.bfloat16, fp8)
                    got = case.dispatch(runtime)
                    case.check(runtime.rank, got)
                    for seed in range(2):
                        case.combine(runtime, got, torch.bfloat16, seed, bool(seed), bool(seed))
    print(f"rank {boot.rank}: shapes OK", flush=True)


def latency_shapes_rank() -> None:
    """As many tokens as decoding has, with short rows and with wide ones."""
    boot, device = join()
    for num_topk, num_tokens, hidden, num_sms in ((1, 256, 256, 2), (8, 256, 256, 8), (8, 128, 7168, 16)):
        work = _work(boot.size, num_topk, num_tokens)
        with open_runtime(
            boot, device, work, hidden, max_tokens=256, decode_tokens=num_tokens, num_sms=num_sms
        ) as runtime:
            for alignment, fp8 in ((1, None), (8, "pow2")):
                case = case_of(work, "grouped", alignment, hidden, torch.bfloat16, fp8)
                for _ in range(3):
                    check_latency(case, runtime)
    print(f"rank {boot.rank}: latency shapes OK", flush=True)


def orders_rank() -> None:
    """First halves on one stream and second halves on another, with other rows each time; second halves out of order;
    more blocks than the chip has."""
    boot, device = join()
    works = [_work(boot.size, 3, 64, seed) for seed in range(4)]
    with open_runtime(boot, device, works[0], 512, decode_tokens=64) as runtime:
        for work in works * 2:
            _halves_on_two_streams(runtime, work)
        _wrong_orders(runtime, works[0])
        check_latency(case_of(works[1], "grouped", 8, 512, torch.bfloat16), runtime)
    with (
        pytest.raises(ConfigError, match="num_sms or num_local_sms=1000 is above the"),
        open_runtime(boot, device, works[0], 512, num_sms=1000),
    ):
        raise AssertionError("a Runtime with more blocks than are resident")
    boot.barrier(60)
    print(f"rank {boot.rank}: orders OK", flush=True)


def _halves_on_two_streams(runtime: Runtime, work: Workload) -> None:
    rank, first, second = runtime.rank, torch.cuda.Stream(), torch.cuda.Stream()
    case = case_of(work, "grouped", 8, 512, torch.bfloat16)
    with torch.cuda.stream(first):
        torch.cuda._sleep(2_000_000)
        x, idx = case.xs[rank].cuda(), work.topk_idx[rank].cuda()
        weights = work.topk_weights[rank].cuda()
        pending = runtime.dispatch_send(x, idx, weights, expert_alignment=8)
        del x, idx, weights  # the Runtime keeps them until it has read them
        torch.full((64, 512), torch.nan, dtype=torch.bfloat16, device="cuda")
    with torch.cuda.stream(second):
        got = runtime.dispatch_recv(pending)
        y = got.x * 2
    with torch.cuda.stream(first):
        first.wait_stream(second)
        sent = runtime.combine_send(y, got.handle, weights=got.row_weights)
    with torch.cuda.stream(second):
        out = runtime.combine_recv(sent).x
        second.synchronize()
    case.check(rank, got)
    ys, weights_of = [each.x * 2 for each in case.expected], [each.row_weights for each in case.expected]
    nodes = [0] * runtime.num_ranks
    expected = reference.combine(ys, case.expected, work.topk_idx, work.num_experts, nodes, weights=weights_of)
    assert_bits(out, expected[rank][0], "halves on two streams")
    first.synchronize()


def _wrong_orders(runtime: Runtime, work: Workload) -> None:
    """Of the latency regime, whose kernels take in the oldest operation."""
    rank = runtime.rank
    arguments = (
        case_of(work, "grouped", 1, 512, torch.bfloat16).xs[rank].cuda(),
        work.topk_idx[rank].cuda(),
        work.topk_weights[rank].cuda(),
    )
    older, newer = [runtime.dispatch_send(*arguments, regime="latency") for _ in range(2)]
    with pytest.raises(ConfigError, match="one that was sent before it has not"):
        runtime.dispatch_recv(newer)
    runtime.dispatch_recv(older)
    with pytest.raises(ConfigError, match="has been received already"):
        runtime.dispatch_recv(older)
    with pytest.raises(ConfigError, match="receive it before a whole call"):
        runtime.dispatch(*arguments, regime="latency")
    runtime.dispatch_recv(newer)
