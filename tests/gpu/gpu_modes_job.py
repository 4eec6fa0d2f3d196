"""Ways to call the GPU executor: growing heaps, fixed capacities, CUDA graphs, autograd, beside NCCL."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gpu.gpu_job import Case, case_of, join, open_runtime, workload_of
from row_cases import assert_bits
from torch import Tensor

from commlib import ops, reference
from commlib.bootstrap import Bootstrap, connect
from commlib.config import RuntimeConfig
from commlib.errors import ConfigError, PeerLostError
from commlib.runtime import Runtime
from commlib.testing.payloads import random_payload


def growth_rank() -> None:
    """Heaps that are too small are replaced, by some ranks or all; older results and handles stay good."""
    boot, device = join()
    work, last = workload_of("uneven", boot.size, num_tokens=100), boot.size - 1
    arena_bytes = (64 << 10) if boot.rank == last else (8 << 20)
    with open_runtime(boot, device, work, 1024, arena_bytes=arena_bytes) as runtime:
        before = runtime.memory().arena_bytes
        cases = [case_of(work, layout, 8, 1024, torch.bfloat16) for layout in ("grouped", "rows", "grouped")]
        kept = []
        for alignment, case in zip((8, 8, 1024), cases, strict=True):
            case = Case(case.work, case.layout, alignment, case.xs)
            kept.append((case, case.dispatch(runtime)))
        assert runtime.memory().arena_bytes > before
        for case, got in kept:
            case.check(runtime.rank, got)
            case.combine(runtime, got, torch.bfloat16, 3, True, True)
            again = runtime.dispatch(case.xs[runtime.rank].cuda(), handle=got.handle)
            case.check(runtime.rank, again, is_by_handle=True)
    print(f"rank {boot.rank}: growth OK", flush=True)


def _check_capacity_result(case: Case, rank: int, got: Any, capacity: int) -> None:
    """The rows that matter are those of an exact call; behind them nothing counts."""
    expected = case.expected[rank]
    count = len(expected.source)
    assert got.x.shape[0] == capacity and count <= capacity
    assert got.num_tokens_per_expert.tolist() == expected.num_tokens_per_expert
    for name in ("x", "scales", "row_weights", "topk_idx", "topk_weights"):
        wanted, have = getattr(expected, name), getattr(got, name)
        assert_bits(None if have is None else have[:count], wanted, f"capacity {case.name}: {name}")
    if got.row_weights is not None:
        assert bool((got.row_weights[count:] == 0).all())
    if got.topk_idx is not None:
        assert bool((got.topk_idx[count:] == -1).all()) and bool((got.topk_weights[count:] == 0).all())


def capacity_rank() -> None:
    """Fixed numbers of rows: the same results without a host that waits, and an overflow that everybody sees."""
    boot, device = join()
    for seed, name in enumerate(("uniform", "masked", "uneven", "empty_rank", "skewed")):
        work = workload_of(name, boot.size, seed, 64)
        with open_runtime(boot, device, work, 256) as runtime:
            rank = runtime.rank
            for layout in ("grouped", "rows"):
                for fp8 in (None, "pow2"):
                    case = case_of(work, layout, 8, 256, torch.bfloat16, fp8)
                    most = max(len(each.source) for each in case.expected)
                    got = case.dispatch(runtime, capacity=most + 5)
                    _check_capacity_result(case, rank, got, most + 5)
                    _combine_capacity(case, runtime, got)
                    assert int(runtime.overflowed()) == 0
                    if most > 1:
                        over = case.dispatch(runtime, capacity=most - 1)
                        assert over.num_tokens_per_expert.tolist() == [0] * (work.num_experts // boot.size)
                        out = runtime.combine(torch.zeros_like(over.x, dtype=torch.bfloat16), over.handle)
                        assert bool(out.x.isnan().all()) and int(runtime.overflowed()) == 1
                        runtime.overflowed().zero_()
            # A refusal is raised by a later call.
            bad = work.topk_idx[rank].cuda()
            if rank == boot.size - 1 and bad.shape[0]:
                bad[0, 0] = 99
            x = torch.zeros(bad.shape[0], 256, dtype=torch.bfloat16, device=device)
            refused = runtime.dispatch(x, bad, capacity=4096)
            torch.cuda.synchronize()
            if work.topk_idx[-1].shape[0]:
                with pytest.raises(ConfigError, match="expert id 99 at token 0, slot 0"):
                    runtime.check()
                assert int(refused.num_tokens_per_expert.sum()) == 0
            boot.barrier(60)
    print(f"rank {boot.rank}: capacity OK", flush=True)


def _combine_capacity(case: Case, runtime: Runtime, got: Any) -> None:
    ys = [random_payload(r, len(each.source), 256, torch.bfloat16, 9) for r, each in enumerate(case.expected)]
    y = torch.full((got.x.shape[0], 256), torch.nan, dtype=torch.bfloat16, device=runtime_device())
    y[: len(ys[runtime.rank])] = ys[runtime.rank].cuda()
    out = runtime.combine(y, got.handle).x
    nodes = [0] * runtime.num_ranks
    expected = reference.combine(ys, case.expected, case.work.topk_idx, case.work.num_experts, nodes)
    assert_bits(out, expected[runtime.rank][0], f"capacity: combine {case.name}")
    again = runtime.dispatch(case.xs[runtime.rank].cuda(), handle=got.handle, fp8=case.fp8)
    count = len(case.expected[runtime.rank].source)
    assert_bits(again.x[:count], case.expected[runtime.rank].x, f"capacity: by handle {case.name}")


def runtime_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def graph_rank() -> None:
    """A captured dispatch, expert and combine, replayed with other tokens and choices; eager calls in between."""
    boot, device = join()
    works = [workload_of("uniform", boot.size, seed, 48) for seed in range(4)]
    with open_runtime(boot, device, works[0], 512) as runtime:
        rank = runtime.rank
        x = torch.zeros(48, 512, dtype=torch.bfloat16, device=device)
        idx, weights = works[0].topk_idx[rank].cuda(), works[0].topk_weights[rank].cuda()
        capacity = boot.size * 48 * 3 + 12 * 8

        def step() -> Tensor:
            got = runtime.dispatch(x, idx, weights, capacity=capacity, expert_alignment=8)
            return runtime.combine(got.x * 2, got.handle, weights=got.row_weights).x

        step()
        torch.cuda.synchronize()
        boot.barrier(60)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for round_trip in range(12):
            work = works[round_trip % len(works)]
            case = case_of(work, "grouped", 8, 512, torch.bfloat16)
            x.copy_(case.xs[rank])
            idx.copy_(work.topk_idx[rank])
            weights.copy_(work.topk_weights[rank])
            out.fill_(torch.nan)
            graph.replay()
            ys = [each.x * 2 for each in case.expected]
            nodes, rows = [0] * boot.size, [each.row_weights for each in case.expected]
            expected = reference.combine(ys, case.expected, work.topk_idx, work.num_experts, nodes, weights=rows)
            assert_bits(out, expected[rank][0], f"graph: replay {round_trip}")
            if round_trip % 3 == 2:
                case.check(rank, case.dispatch(runtime))
        runtime.check()
    print(f"rank {boot.rank}: graph OK", flush=True)


def latency_rank() -> None:
    boot, device = join()
    check_latency_regime(boot, device)
    print(f"rank {boot.rank}: latency OK", flush=True)


def check_latency_regime(boot: Bootstrap, device: torch.device) -> None:
    """Against the oracle: whole, in halves, captured; too little room; bad choices."""
    for seed, name in enumerate(("uniform", "masked", "uneven", "empty_rank", "skewed")):
        work = workload_of(name, boot.size, seed, 40)
        tokens = max(work.num_tokens)
        with open_runtime(boot, device, work, 512, decode_tokens=max(tokens, 1)) as runtime:
            for alignment, fp8 in ((1, None), (8, "pow2"), (8, None), (1, "fp32")):
                case = Case(work, "grouped", alignment, case_of(work, "grouped", 1, 512, torch.bfloat16).xs, fp8)
                check_latency(case, runtime)
            _check_latency_halves(case, runtime)
            _check_latency_graph(work, runtime)
            _check_latency_errors(case, runtime)


def _latency_combine_inputs(case: Case, capacity: int, rank: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    hidden = case.xs[0].shape[1]
    ys = [random_payload(r, len(each.source), hidden, torch.bfloat16, 9) for r, each in enumerate(case.expected)]
    y = torch.full((capacity, hidden), torch.nan, dtype=torch.bfloat16, device=runtime_device())
    y[: len(ys[rank])] = ys[rank].cuda()
    weights = [each.row_weights for each in case.expected]
    return ys, y, weights


def check_latency(case: Case, runtime: Runtime, *, in_halves: bool = False) -> None:
    rank, work = runtime.rank, case.work
    x, idx, weights = case.xs[rank].cuda(), work.topk_idx[rank].cuda(), work.topk_weights[rank].cuda()
    options = {"regime": "latency", "fp8": case.fp8, "expert_alignment": case.alignment}
    if in_halves:
        got = runtime.dispatch_recv(runtime.dispatch_send(x, idx, weights, **options))
    else:
        got = runtime.dispatch(x, idx, weights, **options)
    _check_capacity_result(case, rank, got, got.x.shape[0])
    ys, y, row_weights = _latency_combine_inputs(case, got.x.shape[0], rank)
    for is_weighted in (True, False):
        given = got.row_weights if is_weighted else None
        if in_halves:
            out = runtime.combine_recv(runtime.combine_send(y, got.handle, weights=given)).x
        else:
            out = runtime.combine(y, got.handle, weights=given).x
        nodes, taken = list(runtime.topology.node_of_rank), row_weights if is_weighted else None
        expected = reference.combine(ys, case.expected, work.topk_idx, work.num_experts, nodes, weights=taken)
        assert_bits(out, expected[rank][0], f"latency: combine {case.name} weighted {is_weighted}")


def _check_latency_halves(case: Case, runtime: Runtime) -> None:
    """Two dispatches under way, received in order; a third one is refused on the host."""
    for _ in range(5):
        check_latency(case, runtime, in_halves=True)
    rank, work = runtime.rank, case.work
    options = {"regime": "latency", "fp8": case.fp8, "expert_alignment": case.alignment}
    other = Case(work, "grouped", case.alignment, [-x for x in case.xs], case.fp8)

    def send(which: Case) -> Any:
        arguments = (which.xs[rank].cuda(), work.topk_idx[rank].cuda(), work.topk_weights[rank].cuda())
        return runtime.dispatch_send(*arguments, **options)

    pending = [send(which) for which in (case, other)]
    if runtime.topology.num_nodes == 1:
        with pytest.raises(ConfigError, match="are without their second half"):
            send(case)
    for each, which in zip(pending, (case, other), strict=True):
        got = runtime.dispatch_recv(each)
        _check_capacity_result(which, rank, got, got.x.shape[0])


def _check_latency_graph(work: Any, runtime: Runtime) -> None:
    rank = runtime.rank
    case = case_of(work, "grouped", 1, 512, torch.bfloat16)
    x, idx = torch.zeros_like(case.xs[rank], device=runtime_device()), work.topk_idx[rank].cuda()
    weights = work.topk_weights[rank].cuda()

    def step() -> Tensor:
        got = runtime.dispatch(x, idx, weights, regime="latency", expert_alignment=1)
        return runtime.combine(got.x * 2, got.handle, weights=got.row_weights).x

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for replay in range(7):
        case = case_of(work, "grouped", 1, 512, torch.bfloat16, seed=replay)
        x.copy_(case.xs[rank])
        ys, rows = [each.x * 2 for each in case.expected], [each.row_weights for each in case.expected]
        nodes = list(runtime.topology.node_of_rank)
        expected = reference.combine(ys, case.expected, work.topk_idx, work.num_experts, nodes, weights=rows)
        out.fill_(torch.nan)
        graph.replay()
        assert_bits(out, expected[rank][0], f"latency: replay {replay}")
        check_latency(case, runtime)


def _check_latency_errors(case: Case, runtime: Runtime) -> None:
    rank, work = runtime.rank, case.work
    x, idx, weights = case.xs[rank].cuda(), work.topk_idx[rank].cuda(), work.topk_weights[rank].cuda()
    most = max(len(each.source) for each in case.expected)
    if most > 1:
        options: dict[str, Any] = {"regime": "latency", "expert_alignment": case.alignment, "capacity": most - 1}
        over = runtime.dispatch(x, idx, weights, **options)
        assert int(over.num_tokens_per_expert.sum()) == 0
        out = runtime.combine(torch.zeros_like(over.x), over.handle).x
        assert bool(out.isnan().all()) and int(runtime.overflowed()) == 1
        runtime.overflowed().zero_()
    if len(work.topk_idx[-1]):
        last = runtime.num_ranks - 1
        token, slots = len(work.topk_idx[-1]) - 1, (work.topk_idx[-1][-1] >= 0).nonzero()[:, 0].tolist()
        wrong: list[tuple[str, Any]] = [("expert id 99 at token 0, slot 0", lambda i, w: i[0].fill_(99))]
        wrong.append(("expert id -7 at token 0, slot 0", lambda i, w: i[0, :1].fill_(-7)))
        if len(slots) > 1:
            first, second = slots[:2]
            expert = int(work.topk_idx[-1][-1, first])
            again = f"expert {expert} occurs twice at token {token}, slot {second}"
            wrong.append((again, lambda i, w: i[-1, second].fill_(expert)))
        if slots:
            heavy = f"weight inf at token {token}, slot {slots[0]}"
            wrong.append((heavy, lambda i, w: w[-1, slots[0]].fill_(torch.inf)))
        for words, spoil in wrong:
            bad, bad_weights = idx.clone(), weights.clone()
            if rank == last:
                spoil(bad, bad_weights)
            refused = runtime.dispatch(x, bad, bad_weights, regime="latency")
            torch.cuda.synchronize()
            assert int(refused.num_tokens_per_expert.sum()) == 0
            with pytest.raises(ConfigError, match=words):
                runtime.check()
    check_latency(case, runtime)


def autograd_rank() -> None:
    boot, device = join()
    check_autograd(boot, device)
    print(f"rank {boot.rank}: autograd OK", flush=True)


def check_autograd(boot: Bootstrap, device: torch.device) -> None:
    """Forward and backward against a dense formulation: y_t = sum over slots of weight * scale[expert] * x_t."""
    for name in ("uniform", "masked", "empty_rank"):
        work = workload_of(name, boot.size, 1, 40)
        with open_runtime(boot, device, work, 256) as runtime:
            rank, per_rank = runtime.rank, work.num_experts // boot.size
            scale = torch.arange(1, work.num_experts + 1, device=device, dtype=torch.float32) / 8
            for layout, is_captured in (("grouped", False), ("grouped", True)):
                x = random_payload(rank, work.topk_idx[rank].shape[0], 256, torch.float32, 4).to(device)
                idx = work.topk_idx[rank].to(device)
                weights = work.topk_weights[rank].to(device)
                grad = random_payload(rank, x.shape[0], 256, torch.float32, 5).to(device)
                ours, dense = [(x.clone().requires_grad_(), weights.clone().requires_grad_()) for _ in range(2)]
                options: dict[str, Any] = {"capacity": boot.size * 40 * 3 + 12 * 8} if is_captured else {}
                got = ops.dispatch(runtime, ours[0], idx, ours[1], layout=layout, **options)
                sizes = torch.as_tensor(got.num_tokens_per_expert, device=device).long()
                padded = (sizes + 7) // 8 * 8
                of_row = torch.repeat_interleave(torch.arange(per_rank, device=device), padded)
                of_row = torch.nn.functional.pad(of_row, (0, got.x.shape[0] - len(of_row)))
                y = got.x * scale[rank * per_rank + of_row][:, None] * got.row_weights[:, None]
                y = torch.where(torch.arange(len(y), device=device)[:, None] < padded.sum(), y, 0)
                out = ops.combine(runtime, y, got.handle)
                out.backward(grad)
                factor = torch.where(idx >= 0, scale[idx.clamp(min=0)], 0.0)
                reference_out = (dense[1] * factor).sum(dim=1, keepdim=True) * dense[0]
                reference_out.backward(grad)
                # Sums of at most 2 * 3 rounded products: 8 * 2^-24 of the sum of magnitudes.
                for ours_value, dense_value, magnitude in (
                    (out, reference_out, (weights.abs() * factor).sum(dim=1, keepdim=True) * x.abs()),
                    (ours[0].grad, dense[0].grad, (weights.abs() * factor).sum(dim=1, keepdim=True) * grad.abs()),
                ):
                    assert ours_value is not None and dense_value is not None
                    assert bool(((ours_value - dense_value).abs() <= 8 * 2.0**-24 * magnitude).all()), name
                assert ours[1].grad is not None and dense[1].grad is not None
                bound = 256 * 2.0**-24 * (x * grad).abs().sum(dim=1, keepdim=True) * factor.abs() + 1e-30
                assert bool(((ours[1].grad - dense[1].grad).abs() <= bound).all()), f"{name}: weight gradients"


def nccl_rank() -> None:
    """Beside NCCL on other streams, in different orders on different ranks."""
    boot, device = join()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("COMMLIB_TEST_PORT", "29517"))
    dist.init_process_group("nccl", rank=boot.rank, world_size=boot.size, device_id=device)
    work = workload_of("uniform", boot.size, num_tokens=64)
    with open_runtime(boot, device, work, 1024, num_sms=16) as runtime:
        case = case_of(work, "grouped", 8, 1024, torch.bfloat16)
        side, total = torch.cuda.Stream(), torch.full((1 << 22,), float(boot.rank + 1), device=device)
        for round_trip in range(20):
            reduced = total.clone()
            side.wait_stream(torch.cuda.current_stream())

            def reduce_beside(tensor: Tensor = reduced) -> None:
                with torch.cuda.stream(side):
                    dist.all_reduce(tensor)

            if (round_trip + boot.rank) % 2:
                reduce_beside()
            pending = runtime.dispatch_send(
                case.xs[boot.rank].cuda(), work.topk_idx[boot.rank].cuda(), work.topk_weights[boot.rank].cuda()
            )
            if not (round_trip + boot.rank) % 2:
                reduce_beside()
            got = runtime.dispatch_recv(pending)
            torch.cuda.current_stream().wait_stream(side)
            assert float(reduced[-1]) == boot.size * (boot.size + 1) / 2
            case.check(boot.rank, got)
    dist.destroy_process_group()
    print(f"rank {boot.rank}: nccl OK", flush=True)


def killed_rank() -> None:
    """A rank that is killed gives PeerLostError on the others within seconds, also to kernels that wait for it."""
    boot = connect(None)
    device = torch.device("cuda", boot.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    work = workload_of("uniform", boot.size)
    case = case_of(work, "grouped", 8, 256, torch.bfloat16)
    config = RuntimeConfig(hidden=256, num_experts=12, num_topk=3, max_tokens=128, timeout_s=60.0, num_sms=4)
    runtime = Runtime(boot, config, device=device)
    case.check(boot.rank, case.dispatch(runtime))
    if boot.rank == boot.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        case.dispatch(runtime)
    assert caught.value.peer == boot.size - 1 and time.monotonic() - start < 10
    torch.cuda.synchronize()
    assert float(torch.ones(8, device=device).sum()) == 8.0 and time.monotonic() - start < 20
    runtime.close()
    print(f"rank {boot.rank}: killed OK", flush=True)
