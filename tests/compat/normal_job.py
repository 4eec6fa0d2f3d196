"""`Buffer` in normal mode on real ranks, against the oracle bit by bit. Functions named *_rank run on every rank."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from compat.compat_job import HIDDEN, Case, Job, case_of, deep_ep, joined, weight_grads
from row_cases import assert_bits
from torch import Tensor

from commlib.errors import ConfigError
from commlib.testing.workloads import WORKLOADS


def dispatch(buffer: Any, job: Job, case: Case, x: Any = None, **options: Any) -> Any:
    """As Megatron-Core and torchtitan call it: layout first, all of it handed on."""
    work = case.work
    idx = job.here(work.topk_idx[job.rank])
    previous = deep_ep.EventOverlap(deep_ep.EventHandle())
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        idx, work.num_experts, previous_event=previous, async_finish=True, allocate_on_comm_stream=True
    )
    result = buffer.dispatch(
        job.here(case.xs[job.rank]) if x is None else x,
        topk_idx=idx,
        topk_weights=job.here(work.topk_weights[job.rank]),
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=event,
        async_finish=True,
        allocate_on_comm_stream=True,
        **options,
    )
    result[-1].current_stream_wait()
    return result


def check_received(job: Job, case: Case, got: Any, what: str) -> None:
    expected = case.expected[job.rank]
    assert_bits(got[0], expected.x, f"{what}: x")
    assert_bits(got[1], expected.topk_idx, f"{what}: topk_idx")
    assert_bits(got[2], expected.topk_weights, f"{what}: topk_weights")
    assert got[3] == expected.num_tokens_per_expert and isinstance(got[3], list), what


def check_combine(job: Job, buffer: Any, case: Case, handle: Any, seed: int, *, has_grads: bool) -> None:
    dtype = case.xs[0].dtype if case.fp8 is None else torch.bfloat16
    ys = case.expert_rows(seed, dtype)
    shape = (case.work.topk_idx[0].shape[1],)
    grads = [weight_grads(rank, (len(y), *shape), seed) for rank, y in enumerate(ys)] if has_grads else None
    out, out_grads, event = buffer.combine(
        job.here(ys[job.rank]), handle, topk_weights=None if grads is None else job.here(grads[job.rank])
    )
    event.current_stream_wait()
    expected, expected_grads = case.combined(job, ys, weight_grads=grads)
    assert_bits(out, expected, "combine: x")
    assert_bits(out_grads, expected_grads, "combine: topk_weights")


def check_again(job: Job, buffer: Any, case: Case, handle: Any, seed: int) -> None:
    """A dispatch by handle, as in the backward of combine."""
    again = case.again(seed, case.xs[0].dtype)
    x, *nothing, event = buffer.dispatch(job.here(again.xs[job.rank]), handle=handle, async_finish=True)
    event.current_stream_wait()
    assert_bits(x, again.expected[job.rank].x, "by handle: x")
    assert nothing == [None] * 4


def plain_rank(store: str, device: str = "cpu") -> None:
    with joined(store, device) as job:
        buffer = deep_ep.Buffer(job.group)
        assert (buffer.rank, buffer.group_size, buffer.group) == (job.rank, job.size, job.group)
        for seed, name in enumerate(WORKLOADS):
            for dtype in (torch.bfloat16, torch.float32):
                case = case_of(job, name, dtype=dtype, seed=seed)
                got = dispatch(buffer, job, case)
                check_received(job, case, got, f"{name}, {dtype}")
                handle = got[4]
                # Megatron's order, and another one.
                check_combine(job, buffer, case, handle, seed, has_grads=False)
                check_again(job, buffer, case, handle, seed + 100)
                check_combine(job, buffer, case, handle, seed + 1, has_grads=True)
                check_again(job, buffer, case, handle, seed + 101)


def layout_rank(store: str, device: str = "cpu") -> None:
    with joined(store, device) as job:
        buffer = deep_ep.Buffer(job.group)
        for name in ("uniform", "masked", "all_masked", "empty_rank"):
            work = case_of(job, name).work
            idx = work.topk_idx[job.rank]
            per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(job.here(idx), work.num_experts)
            assert per_node is None and event.event is None
            chosen = [{expert for expert in row if expert >= 0} for row in idx.tolist()]
            experts_per_rank = work.num_experts // job.size
            ranks = [{expert // experts_per_rank for expert in experts} for experts in chosen]
            assert in_rank.dtype == torch.bool and in_rank.shape == (len(idx), job.size)
            assert in_rank.tolist() == [[rank in each for rank in range(job.size)] for each in ranks]
            assert per_rank.dtype == per_expert.dtype == torch.int32
            assert per_rank.tolist() == [sum(rank in each for each in ranks) for rank in range(job.size)]
            assert per_expert.tolist() == [sum(e in each for each in chosen) for e in range(work.num_experts)]


def options_rank(store: str, device: str = "cpu") -> None:
    """Aligned counts, worst-case rows, FP8 tuples, biases."""
    with joined(store, device) as job:
        buffer = deep_ep.Buffer(job.group)
        case = case_of(job, "masked")
        expected = case.expected[job.rank]
        assert dispatch(buffer, job, case, expert_alignment=128)[3] == [
            -(-count // 128) * 128 for count in expected.num_tokens_per_expert
        ]
        check_worst(job, buffer, case)
        check_fp8(job, buffer)
        handle = dispatch(buffer, job, case)[4]
        ys = case.expert_rows(3, torch.bfloat16)
        tokens = case.combined(job, ys)[0]
        biases = [weight_grads(job.rank, tokens.shape, seed).bfloat16() for seed in (1, 2)]
        for given in (biases[0], tuple(biases)):
            summed = tokens.float()
            for bias in [given] if isinstance(given, Tensor) else given:
                summed = summed + bias.float()
            here = job.here(given) if isinstance(given, Tensor) else tuple(job.here(bias) for bias in given)
            out, _, _ = buffer.combine(job.here(ys[job.rank]), handle=handle, bias=here)
            assert_bits(out, summed.bfloat16(), "biases")


def check_worst(job: Job, buffer: Any, case: Case) -> None:
    num_worst = job.size * 40
    expected = case.expected[job.rank]
    count = len(expected.source)
    x, idx, weights, counts, handle, _ = dispatch(buffer, job, case, num_worst_tokens=num_worst)
    assert counts == [] and x.shape == (num_worst, HIDDEN)
    assert_bits(x[:count], expected.x, "worst: x")
    assert_bits(idx[:count], expected.topk_idx, "worst: topk_idx")
    assert_bits(weights[:count], expected.topk_weights, "worst: topk_weights")
    assert bool((idx[count:] == -1).all()) and not bool(weights[count:].any()) and not bool(x[count:].any())
    ys = case.expert_rows(4, torch.bfloat16)
    grads = [weight_grads(rank, (len(y), idx.shape[1]), 5) for rank, y in enumerate(ys)]
    y, grad = torch.full((num_worst, HIDDEN), torch.nan).bfloat16(), torch.full((num_worst, idx.shape[1]), torch.nan)
    y[:count], grad[:count] = ys[job.rank], grads[job.rank]
    out, out_grads, _ = buffer.combine(job.here(y), handle, topk_weights=job.here(grad))
    tokens, token_grads = case.combined(job, ys, weight_grads=grads)
    assert_bits(out, tokens, "worst: combine")
    assert_bits(out_grads, token_grads, "worst: combined weights")
    again = case.again(6, torch.bfloat16)
    x, *_ = buffer.dispatch(job.here(again.xs[job.rank]), handle=handle)
    assert_bits(x[:count], again.expected[job.rank].x, "worst: by handle")
    assert len(x) == num_worst
    # Too few for one rank alone: all of them raise, in this call.
    skewed = case_of(job, "masked", seed=2)
    lengths = [len(each.source) for each in skewed.expected]
    assert min(lengths) < max(lengths), "the case has a rank that would not notice"
    message = f"rank {lengths.index(max(lengths))} receives {max(lengths)} rows, num_worst_tokens={max(lengths) - 1} "
    with pytest.raises(ConfigError, match=message):
        dispatch(buffer, job, skewed, num_worst_tokens=max(lengths) - 1)
    assert len(dispatch(buffer, job, skewed, num_worst_tokens=max(lengths))[0]) == max(lengths)


def check_fp8(job: Job, buffer: Any) -> None:
    from commlib.quant import quantize_e4m3

    case = case_of(job, "uneven", fp8="fp32")
    expected = case.expected[job.rank]
    q, scales = quantize_e4m3(case.xs[job.rank])
    strided = scales.t().contiguous().t()  # as DeepGEMM wants them
    (x, x_scales), idx, _, _, handle, _ = dispatch(buffer, job, case, x=(job.here(q), job.here(strided)))
    assert_bits(x, expected.x, "fp8: x")
    assert_bits(x_scales, expected.scales, "fp8: scales")
    assert_bits(idx, expected.topk_idx, "fp8: topk_idx")
    (x, x_scales), *_ = buffer.dispatch((job.here(q), job.here(scales)), handle=handle)
    assert_bits(x, expected.x, "fp8 by handle: x")
    assert_bits(x_scales, expected.scales, "fp8 by handle: scales")
    check_combine(job, buffer, case, handle, 8, has_grads=False)
    for wrong in (scales[:, :1], scales.view(torch.int32)):
        with pytest.raises(NotImplementedError, match="carries FP8 rows with float32 scales"):
            buffer.dispatch((job.here(q), job.here(wrong)), handle=handle)


def lifetimes_rank(store: str, device: str = "cpu") -> None:
    """Many handles at once; a handle that outlives its buffer; buffers dropped by one rank and not by another."""
    with joined(store, device) as job:
        buffers = [deep_ep.Buffer(job.group, 0, 0) for _ in range(2)]
        cases = [case_of(job, name, seed=seed) for seed, name in enumerate(WORKLOADS[:6])]
        handles = [dispatch(buffers[i % 2], job, case)[4] for i, case in enumerate(cases)]
        runtimes = {id(handle.runtime) for handle in handles}
        assert len(runtimes) == 1, "one shape, one Runtime"
        if job.rank != 1:
            buffers.clear()
            gc.collect()
        for seed, i in enumerate((3, 0, 5, 1, 4, 2)):
            buffer = deep_ep.Buffer(job.group)
            check_again(job, buffer, cases[i], handles[i], seed)
            check_combine(job, buffer, cases[i], handles[i], seed, has_grads=bool(i % 2))
        deep_ep.Buffer.set_num_sms(6)
        other = case_of(job, "uniform", hidden=HIDDEN // 2)
        handle = dispatch(deep_ep.Buffer(job.group), job, other)[4]
        assert id(handle.runtime) not in runtimes, "another shape, another Runtime"
        assert handle.runtime.config.num_sms == 6
        check_combine(job, deep_ep.Buffer(job.group), other, handle, 1, has_grads=True)
        check_combine(job, deep_ep.Buffer(job.group), cases[0], handles[0], 2, has_grads=True)


def destroy_rank(store: str, device: str = "cpu") -> None:
    with joined(store, device) as job, pytest.raises(ConfigError, match="explicitly_destroy"):
        deep_ep.Buffer(job.group).destroy()
    # A group whose buffers are all destroyed starts anew.
    with joined(f"{store}-2", device) as job:
        case = case_of(job, "masked")
        first, second = (deep_ep.Buffer(job.group, explicitly_destroy=True) for _ in range(2))
        handle = dispatch(first, job, case)[4]
        first.destroy()
        first.destroy()
        with pytest.raises(ConfigError, match="this buffer is destroyed"):
            dispatch(first, job, case)
        check_combine(job, second, case, handle, 1, has_grads=True)
        second.destroy()
        with pytest.raises(ConfigError, match="closed"):
            second.combine(job.here(case.expected[job.rank].x), handle)
        third = deep_ep.Buffer(job.group, 1 << 20, explicitly_destroy=True)
        check_received(job, case, dispatch(third, job, case), "after destroy")
        third.destroy()


def tensor_parallel_rank(store: str, device: str = "cpu") -> None:
    """TP x EP groups: every token goes to `tp` ranks per expert it chose, up to K = 64 slots and all ranks."""
    with joined(store, device) as job:
        buffer = deep_ep.Buffer(job.group)
        for num_topk, num_experts in ((8, 16), (64, 64)):
            case = case_of(job, "uniform", num_topk=num_topk, num_experts=num_experts, hidden=64)
            got = dispatch(buffer, job, case)
            check_received(job, case, got, f"K={num_topk}")
            check_combine(job, buffer, case, got[4], 1, has_grads=True)
            check_again(job, buffer, case, got[4], 2)


def refused_rank(store: str, device: str = "cpu") -> None:
    """Errors are those of the Runtime, on all ranks, and the next call works."""
    with joined(store, device) as job:
        buffer = deep_ep.Buffer(job.group)
        case = case_of(job, "uniform")
        work, x = case.work, job.here(case.xs[job.rank])
        idx, weights = work.topk_idx[job.rank].clone(), job.here(work.topk_weights[job.rank])
        per_expert = torch.zeros(work.num_experts)
        with pytest.raises(NotImplementedError, match="by topk_idx and topk_weights"):
            buffer.dispatch(x, num_tokens_per_expert=per_expert)
        with pytest.raises(ConfigError, match="needs num_tokens_per_expert"):
            buffer.dispatch(x, topk_idx=job.here(idx), topk_weights=weights)
        if job.rank == 1:
            idx[0, 1] = idx[0, 0]
        with pytest.raises(ConfigError, match="rank 1"):
            buffer.dispatch(x, topk_idx=job.here(idx), topk_weights=weights, num_tokens_per_expert=per_expert)
        got = dispatch(buffer, job, case)
        check_received(job, case, got, "after an error")
        with pytest.raises(ConfigError, match="y has shape"):
            buffer.combine(got[0][:-1], got[4])
        check_combine(job, buffer, case, got[4], 1, has_grads=False)


def mpi_rank() -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    buffer = deep_ep.Buffer(None, comm=comm, explicitly_destroy=True)
    job = Job(comm, comm.Get_rank(), comm.Get_size(), (0,) * comm.Get_size(), torch.device("cpu"))
    case = case_of(job, "uneven")
    got = dispatch(buffer, job, case)
    check_received(job, case, got, "mpi")
    check_combine(job, buffer, case, got[4], 1, has_grads=True)
    buffer.destroy()
