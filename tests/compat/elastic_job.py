"""`ElasticBuffer` on real ranks, against the oracle bit by bit. Functions named *_rank run on every rank."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from compat.compat_job import HIDDEN, Case, Job, case_of, deep_ep, joined, weight_grads
from row_cases import assert_bits
from torch import Tensor

from commlib.errors import ConfigError
from commlib.quant import quantize_e4m3
from commlib.testing.workloads import WORKLOADS

MAX_TOKENS = 32


def buffer_of(job: Job, **options: Any) -> Any:
    return deep_ep.ElasticBuffer(
        job.group, num_max_tokens_per_rank=MAX_TOKENS, hidden=HIDDEN, num_topk=3, explicitly_destroy=True, **options
    )


def dispatch(buffer: Any, job: Job, case: Case, x: Any = None, **options: Any) -> Any:
    work = case.work
    result = buffer.dispatch(
        job.here(case.xs[job.rank]) if x is None else x,
        topk_idx=job.here(work.topk_idx[job.rank]),
        topk_weights=job.here(work.topk_weights[job.rank]),
        num_experts=work.num_experts,
        do_expand=case.layout == "grouped",
        expert_alignment=case.alignment,
        num_sms=buffer.get_theoretical_num_sms(work.num_experts, 3),
        previous_event=buffer.capture(),
        async_with_compute_stream=True,
        **options,
    )
    result[-1].current_stream_wait()
    return result


def check_received(job: Job, case: Case, got: Any, what: str) -> None:
    """The rows that were asked for, zeros with -1 behind them."""
    recv, idx, weights, handle, _ = got
    expected = case.expected[job.rank]
    count = len(expected.source)
    x, scales = recv if isinstance(recv, tuple) else (recv, None)
    assert_bits(x[:count], expected.x, f"{what}: x")
    assert not bool(x[count:].float().any())
    if scales is not None:
        assert_bits(scales[:count], expected.scales, f"{what}: scales")
    if case.layout == "rows":
        assert_bits(idx[:count], expected.topk_idx, f"{what}: topk_idx")
        assert bool((idx[count:] == -1).all())
    else:
        assert idx is None
    wanted = expected.topk_weights if case.layout == "rows" else expected.row_weights
    assert_bits(weights[:count], wanted, f"{what}: topk_weights")
    assert not bool(weights[count:].any()) and len(x) == len(weights) == handle.num_rows


def check_handle(job: Job, case: Case, handle: Any) -> None:
    expected = case.expected[job.rank]
    counts, alignment = expected.num_tokens_per_expert, case.alignment
    aligned = [-(-count // alignment) * alignment for count in counts]
    assert handle.num_recv_tokens_per_expert_list == aligned
    ends = list(accumulate(aligned))
    if case.layout == "grouped":
        ends = [end - all_of + count for end, all_of, count in zip(ends, aligned, counts, strict=True)]
        assert handle.num_expanded_tokens == len(expected.source)
    assert handle.psum_num_recv_tokens_per_expert.tolist() == ends
    assert handle.num_unaligned_recv_tokens_per_expert.tolist() == counts
    first, last = job.rank * len(counts), (job.rank + 1) * len(counts)
    from_ranks = [int(((idx >= first) & (idx < last)).any(dim=1).sum()) for idx in case.work.topk_idx]
    assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == list(accumulate(from_ranks))
    assert handle.num_recv_tokens == sum(from_ranks)
    assert (handle.do_expand, handle.expert_alignment) == (case.layout == "grouped", alignment)
    assert (handle.num_experts, handle.num_max_tokens_per_rank) == (case.work.num_experts, MAX_TOKENS)
    with pytest.raises(NotImplementedError, match="recv_src_metadata"):
        _ = handle.recv_src_metadata


def check_combine(job: Job, buffer: Any, case: Case, handle: Any, seed: int) -> None:
    """With and without weights, in rows as many as the dispatch gave."""
    ys = case.expert_rows(seed, torch.bfloat16)
    shape = (case.work.topk_idx[0].shape[1],) if case.layout == "rows" else ()
    grads = [weight_grads(rank, (len(y), *shape), seed) for rank, y in enumerate(ys)]
    tokens, token_grads = case.combined(job, ys, weight_grads=grads)
    extra = handle.num_rows - len(ys[job.rank])
    y = torch.cat([ys[job.rank], torch.full((extra, HIDDEN), torch.nan).bfloat16()])
    grad = torch.cat([grads[job.rank], torch.full((extra, *shape), torch.nan)])
    out, nothing, event = buffer.combine(job.here(y), handle=handle, topk_weights=None, async_with_compute_stream=True)
    event.current_stream_wait()
    assert_bits(out, tokens, "combine")
    assert nothing is None
    bias = weight_grads(job.rank, tokens.shape, 9).bfloat16()
    out, out_grads, _ = buffer.combine(job.here(y), handle, topk_weights=job.here(grad), bias=job.here(bias))
    assert_bits(out, (tokens.float() + bias.float()).bfloat16(), "combine with a bias")
    assert_bits(out_grads, token_grads, "combined weights")


def check_again(job: Job, buffer: Any, case: Case, handle: Any, seed: int) -> None:
    """By handle, as torchtitan and DeepSpeed call it: neither of them repeats `do_expand`."""
    again = case.again(seed, torch.bfloat16)
    x, idx, weights, same, _ = buffer.dispatch(
        job.here(again.xs[job.rank]), handle=handle, num_sms=handle.num_sms, do_cpu_sync=False
    )
    expected = again.expected[job.rank].x
    assert_bits(x[: len(expected)], expected, "by handle")
    assert len(x) == handle.num_rows and idx is None and weights is None and same is handle


def plain_rank(store: str, device: str = "cpu") -> None:
    with joined(store, device) as job:
        buffer = buffer_of(job)
        for seed, name in enumerate(WORKLOADS):
            for layout, alignment in (("rows", 1), ("rows", 8), ("grouped", 1), ("grouped", 8)):
                case = case_of(job, name, layout, alignment=alignment, seed=seed)
                for is_synced in (True, False):
                    what = f"{name}, {layout}, alignment {alignment}, synced {is_synced}"
                    got = dispatch(buffer, job, case, do_cpu_sync=is_synced)
                    check_received(job, case, got, what)
                    if is_synced:
                        check_handle(job, case, got[3])
                    check_combine(job, buffer, case, got[3], seed)
                    check_again(job, buffer, case, got[3], seed + 50)
        sizes = buffer.get_logical_domain_size()
        assert sizes == buffer.get_physical_domain_size() == deep_ep.get_logical_domain_size(job.group)
        assert sizes == (len(set(job.nodes)), job.size // len(set(job.nodes)))
        buffer.barrier()
        buffer.destroy()


def worst_rank(store: str, device: str = "cpu") -> None:
    """How many rows there are without a host that waits for counts: as DeepEP allocates them."""
    with joined(store, device) as job:
        buffer = buffer_of(job)
        with pytest.raises(NotImplementedError, match="from its first dispatch on"):
            buffer.get_logical_domain_size()
        compact = case_of(job, "uniform")
        got = dispatch(buffer, job, compact, do_cpu_sync=False)
        assert len(got[0]) == MAX_TOKENS * job.size == got[3].num_recv_tokens
        assert got[3].num_recv_tokens_per_expert_list == []
        expanded = case_of(job, "uniform", "grouped", alignment=8)
        local = expanded.work.num_experts // job.size
        worst = MAX_TOKENS * job.size * min(3, local) + 7 * local
        got = dispatch(buffer, job, expanded, do_cpu_sync=False)
        assert len(got[0]) == -(-worst // 8) * 8
        # Too few for one rank alone: all of them raise, in this call.
        for case, most in ((case_of(job, "masked", seed=2), 12), (case_of(job, "hot", "grouped", alignment=8), 5)):
            lengths = [len(each.source) for each in case.expected]
            rule = f"num_max_tokens_per_rank={most} has room for"
            with pytest.raises(ConfigError, match=f"rank {lengths.index(max(lengths))} receives .* {rule}") as error:
                dispatch(buffer, job, case, do_cpu_sync=False, num_max_tokens_per_rank=most)
            assert min(lengths) <= int(str(error.value).rpartition(" ")[2]) < max(lengths)
        assert len(dispatch(buffer, job, compact, do_cpu_sync=False)[0]) == MAX_TOKENS * job.size


def options_rank(store: str, device: str = "cpu") -> None:
    """FP8 tuples with both layouts of scales, statistics, copies, missing weights, the refused."""
    with joined(store, device) as job:
        buffer = buffer_of(job, deterministic=True)
        assert (buffer.rank_idx, buffer.num_ranks, buffer.num_max_tokens_per_rank) == (job.rank, job.size, MAX_TOKENS)
        stats = torch.zeros(12 // job.size, dtype=torch.int32, device=job.device)
        for layout in ("rows", "grouped"):
            case = case_of(job, "masked", layout, alignment=8, fp8="fp32")
            expected = case.expected[job.rank]
            x = tuple(map(job.here, quantize_e4m3(case.xs[job.rank])))
            for is_column_major in (False, True):
                got = dispatch(
                    buffer,
                    job,
                    case,
                    x=x,
                    use_tma_aligned_col_major_sf=is_column_major,
                    cumulative_local_expert_recv_stats=stats,
                )
                check_received(job, case, got, f"fp8 {layout}")
                scales = got[0][1]
                assert not is_column_major or (scales.stride(0), scales.stride(1) % 4) == (1, 0)
                (rows, scales), *_ = buffer.dispatch(x, handle=got[3])
                assert_bits(rows, expected.x, "fp8 by handle: x")
                assert_bits(scales, expected.scales, "fp8 by handle: scales")
        assert stats.tolist() == [4 * count for count in expected.num_tokens_per_expert]
        check_small_options(job, buffer)


def check_small_options(job: Job, buffer: Any) -> None:
    case = case_of(job, "uniform")
    x, idx = job.here(case.xs[job.rank]), job.here(case.work.topk_idx[job.rank])
    _, _, weights, copying, _ = buffer.dispatch(x, topk_idx=idx, num_experts=case.work.num_experts)
    assert weights is None and copying.topk_idx.data_ptr() != idx.data_ptr()
    assert torch.equal(copying.topk_idx, idx)
    *_, sharing, event = buffer.dispatch(x, topk_idx=idx, num_experts=case.work.num_experts, do_handle_copy=False)
    assert sharing.topk_idx.data_ptr() == idx.data_ptr() and event.event is None
    with pytest.raises(NotImplementedError, match="without weights"):
        buffer.dispatch(x, handle=sharing, topk_weights=idx.float())
    with pytest.raises(ConfigError, match="needs topk_idx and num_experts"):
        buffer.dispatch(x, topk_idx=idx)
    with pytest.raises(NotImplementedError, match="num_cpu_bytes"):
        deep_ep.ElasticBuffer(job.group, num_cpu_bytes=1)
    hint: Tensor = buffer.get_buffer_size_hint(job.group, MAX_TOKENS, HIDDEN, num_topk=3)
    assert buffer.num_bytes == hint < buffer.get_buffer_size_hint(job.group, MAX_TOKENS + 1, HIDDEN, num_topk=3)
