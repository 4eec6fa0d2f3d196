"""Low-latency mode of `Buffer` on real ranks, against the oracle. Functions named *_rank run on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat.compat_job import HIDDEN, NUM_TOKENS, Case, Job, case_of, deep_ep, joined
from row_cases import assert_bits
from torch import Tensor

from commlib import reference
from commlib.errors import ConfigError

MAX_TOKENS = NUM_TOKENS + 3


def low_latency_case(job: Job, name: str, seed: int, fp8: str | None = None, hidden: int = HIDDEN) -> Case:
    return case_of(job, name, "grouped", seed=seed, hidden=hidden, fp8=fp8)


def dispatch(buffer: Any, job: Job, case: Case, **options: Any) -> Any:
    return buffer.low_latency_dispatch(
        job.here(case.xs[job.rank]),
        job.here(case.work.topk_idx[job.rank]),
        MAX_TOKENS,
        case.work.num_experts,
        use_fp8=case.fp8 is not None,
        round_scale=case.fp8 == "pow2",
        **options,
    )


def by_expert(tensor: Tensor, counts: list[int]) -> Tensor:
    """The filled slots, expert after expert: the order of the oracle."""
    return torch.cat([tensor[expert, :count].cpu() for expert, count in enumerate(counts)])


def check_received(job: Job, case: Case, recv: Any, count: Tensor, what: str) -> None:
    expected = case.expected[job.rank]
    counts = expected.num_tokens_per_expert
    shape = (len(counts), job.size * MAX_TOKENS, case.xs[0].shape[1])
    assert count.dtype == torch.int32 and count.tolist() == counts, what
    x, scales = recv if isinstance(recv, tuple) else (recv, None)
    assert x.shape == shape, what
    assert_bits(by_expert(x.view(torch.uint8), counts).view(x.dtype), expected.x, f"{what}: x")
    if scales is None:
        assert case.fp8 is None
        return
    assert scales.stride()[1:] == (1, shape[1]), "slots next to each other"
    if scales.dtype == torch.int32:
        exponents = scales.contiguous().view(torch.uint8)  # four per word, lowest first
        scales = torch.ldexp(torch.ones(exponents.shape), exponents.cpu().int() - 127)
    assert_bits(by_expert(scales, counts), expected.scales, f"{what}: scales")


def experts(job: Job, case: Case, seed: int) -> tuple[list[Tensor], Tensor]:
    """(What the experts of all ranks return, in the oracle's order; this rank's in slots, NaN in the empty ones)."""
    ys = case.expert_rows(seed, torch.bfloat16)
    counts = case.expected[job.rank].num_tokens_per_expert
    slots = torch.full((len(counts), job.size * MAX_TOKENS, case.xs[0].shape[1]), torch.nan).bfloat16()
    for expert, rows in enumerate(ys[job.rank].split(counts)):
        slots[expert, : len(rows)] = rows
    return ys, job.here(slots)


def combined(job: Job, case: Case, ys: list[Tensor]) -> Tensor:
    weights = [received.row_weights for received in case.expected]
    return case.combined(job, ys, weights=weights)[0]


def plain_rank(store: str, device: str = "cpu") -> None:
    with joined(store, device) as job:
        buffer = deep_ep.Buffer(job.group, 0, 1 << 20, low_latency_mode=True, num_qps_per_rank=4)
        assert buffer.low_latency_mode and buffer.num_rdma_bytes == 1 << 20
        stats = torch.zeros(12 // job.size, dtype=torch.int32, device=job.device)
        total = torch.zeros_like(stats, device="cpu")
        for seed, name in enumerate(("uniform", "masked", "empty_rank", "hot", "all_masked")):
            for fp8 in (None, "fp32", "pow2"):
                case = low_latency_case(job, name, seed, fp8)
                recv, count, handle, event, hook = dispatch(
                    buffer, job, case, cumulative_local_expert_recv_stats=stats, async_finish=True
                )
                assert hook is None
                event.current_stream_wait()
                check_received(job, case, recv, count, f"{name}, {fp8}")
                total += torch.tensor(case.expected[job.rank].num_tokens_per_expert)
                assert stats.tolist() == total.tolist()
                check_combine(job, buffer, case, handle, seed)


def check_combine(job: Job, buffer: Any, case: Case, handle: Any, seed: int) -> None:
    idx, weights = job.here(case.work.topk_idx[job.rank]), job.here(case.work.topk_weights[job.rank])
    ys, slots = experts(job, case, seed)
    expected = combined(job, case, ys)
    out, _, hook = buffer.low_latency_combine(slots, idx, weights, handle)
    assert hook is None
    assert_bits(out, expected, "combine")
    raw = buffer.get_next_low_latency_combine_buffer(handle)
    assert raw.shape == slots.shape and raw.dtype == torch.bfloat16
    raw.copy_(slots)
    mine = torch.empty_like(expected, device=job.device)
    out, *_ = buffer.low_latency_combine(slots * 0, idx, weights, handle, zero_copy=True, out=mine)
    assert out is mine
    assert_bits(out, expected, "combine, zero copy")


def hooks_rank(store: str, device: str = "cpu") -> None:
    """Two batches in flight, as two-batch overlap has them; nothing is there before its hook."""
    with joined(store, device) as job:
        buffer = deep_ep.Buffer(job.group, low_latency_mode=True)
        cases = [low_latency_case(job, "uniform", seed, fp8) for seed, fp8 in ((1, "pow2"), (2, None))]
        first, second = (dispatch(buffer, job, case, return_recv_hook=True, use_ue8m0=False) for case in cases)
        with pytest.raises(ConfigError, match="before its dispatch has been received"):
            buffer.low_latency_combine(torch.empty(0), torch.empty(0), torch.empty(0), first[2])
        outs = []
        for case, (recv, count, handle, _, hook) in zip(reversed(cases), (second, first), strict=True):
            hook()
            check_received(job, case, recv, count, "after the hook")
            ys, slots = experts(job, case, 5)
            work = case.work
            idx, weights = job.here(work.topk_idx[job.rank]), job.here(work.topk_weights[job.rank])
            out, _, hook = buffer.low_latency_combine(slots, idx, weights, handle, return_recv_hook=True)
            outs.append((out, hook, combined(job, case, ys)))
        for out, hook, expected in reversed(outs):
            hook()
            assert_bits(out, expected, "combine after the hook")


def formats_rank(store: str, device: str = "cpu") -> None:
    """Packed exponents, and the options that are refused."""
    with joined(store, device) as job:
        buffer = deep_ep.Buffer(job.group)
        case = low_latency_case(job, "skewed", 3, "pow2", hidden=1024)
        recv, count, *_ = dispatch(buffer, job, case, use_ue8m0=True)
        assert recv[1].dtype == torch.int32 and recv[1].shape[2] == 2
        check_received(job, case, recv, count, "ue8m0")
        plain = low_latency_case(job, "uniform", 4)
        with pytest.raises(ConfigError, match="use_ue8m0 needs"):
            dispatch(buffer, job, plain, use_ue8m0=True)
        # On one rank alone: all raise, without a hook in the call, with one in the hook.
        many = MAX_TOKENS + (job.rank == 1)
        x, idx = job.here(torch.zeros(many, HIDDEN).bfloat16()), job.here(torch.full((many, 3), -1))
        for has_hook in (False, True):
            with pytest.raises(ConfigError, match=f"rank 1: {MAX_TOKENS + 1} tokens exceed"):
                buffer.low_latency_dispatch(x, idx, MAX_TOKENS, 12, return_recv_hook=has_hook)[-1]()
        with pytest.raises(NotImplementedError, match="dispatch_wait_recv_cost_stats"):
            dispatch(buffer, job, plain, dispatch_wait_recv_cost_stats=count)
        handle = dispatch(buffer, job, plain)[2]
        for option in ({"use_logfmt": True}, {"combine_wait_recv_cost_stats": count}):
            with pytest.raises(NotImplementedError, match="use_logfmt and combine_wait"):
                buffer.low_latency_combine(count, count, count, handle, **option)
        with pytest.raises(ConfigError, match="zero_copy needs"):
            buffer.low_latency_combine(count, count, count, handle, zero_copy=True)


def masks_rank(store: str, device: str = "cpu") -> None:
    """Masked ranks get nothing, and tokens make do with the others, as if those slots were -1."""
    with joined(store, device) as job:
        buffer = deep_ep.Buffer(job.group, low_latency_mode=True, enable_shrink=True)
        status = torch.full((job.size,), 7, dtype=torch.int32, device=job.device)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0] * job.size
        buffer.low_latency_update_mask_buffer(1, True)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [int(rank == 1) for rank in range(job.size)]
        case = low_latency_case(job, "uniform", 6)
        per_rank = case.work.num_experts // job.size
        idx = tuple(each.masked_fill(each // per_rank == 1, -1) for each in case.work.topk_idx)
        expected = reference.dispatch(case.xs, idx, case.work.topk_weights, case.work.num_experts, layout="grouped")
        recv, count, handle, *_ = dispatch(buffer, job, case)
        assert count.tolist() == expected[job.rank].num_tokens_per_expert
        assert sum(count.tolist()) == 0 or job.rank != 1
        weights = [received.row_weights for received in expected]
        outs = reference.combine(
            [received.x for received in expected], expected, idx, case.work.num_experts, job.nodes, weights=weights
        )
        given = job.here(case.work.topk_idx[job.rank]), job.here(case.work.topk_weights[job.rank])
        out, *_ = buffer.low_latency_combine(recv, *given, handle)
        assert_bits(out, outs[job.rank][0], "masked combine")
        with pytest.raises(ConfigError, match="rank_to_mask=9"):
            buffer.low_latency_update_mask_buffer(9, True)
        buffer.low_latency_clean_mask_buffer()
        buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, case.work.num_experts)
        recv, count, *_ = dispatch(buffer, job, case)
        check_received(job, case, recv, count, "unmasked again")
