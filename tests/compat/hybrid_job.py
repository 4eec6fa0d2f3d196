"""`HybridEPBuffer` on real ranks, against the oracle. Functions named *_rank run on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compat.compat_job import HIDDEN, Case, Job, case_of, deep_ep, joined, weight_grads
from row_cases import assert_bits
from torch import Tensor

from commlib.compat.deep_ep.hybrid_ep_buffer import indices_to_map
from commlib.errors import ConfigError
from commlib.quant import quantize_e4m3


def buffer_of(job: Job, num_local_experts: int) -> Any:
    return deep_ep.HybridEPBuffer(
        group=job.group,
        hidden_dim=HIDDEN,
        max_num_of_tokens_per_rank=4,
        num_local_experts=num_local_experts,
        use_fp8=False,
        num_sms_dispatch_api=16,
        num_sms_combine_api=16,
    )


def dense(case: Case, rank: int) -> tuple[Tensor, Tensor]:
    """The routing of a rank as (map, probabilities), written down one by one."""
    idx, weights = case.work.topk_idx[rank], case.work.topk_weights[rank]
    routing_map = torch.zeros(len(idx), case.work.num_experts, dtype=torch.bool)
    probs = torch.zeros(len(idx), case.work.num_experts)
    for token, row in enumerate(idx.tolist()):
        for slot, expert in enumerate(row):
            if expert >= 0:
                routing_map[token, expert] = True
                probs[token, expert] = weights[token, slot]
    return routing_map, probs


def dispatch(buffer: Any, job: Job, case: Case, **options: Any) -> Any:
    routing_map, probs = map(job.here, dense(case, job.rank))
    return buffer.dispatch_with_permute(
        **{
            "hidden": job.here(case.xs[job.rank]),
            "routing_map": routing_map,
            "probs": probs,
            "scaling_factor": None,
            "num_of_experts_per_rank": case.work.num_experts // job.size,
            "pad_multiple": case.alignment if case.alignment > 1 else None,
            "num_permuted_tokens": None,
            "non_blocking": False,
            **options,
        }
    )


def aligned(case: Case, rank: int) -> list[int]:
    return [-(-count // case.alignment) * case.alignment for count in case.expected[rank].num_tokens_per_expert]


def check_received(job: Job, case: Case, got: Any, what: str) -> None:
    x, probs, scales, counts, handle = got
    expected = case.expected[job.rank]
    assert_bits(x, expected.x, f"{what}: x")
    assert_bits(probs, expected.row_weights, f"{what}: probs")
    assert scales is None and counts.dtype == torch.int64 and counts.tolist() == aligned(case, job.rank)
    assert handle[-1].tolist() == [0]


def check_combine(job: Job, buffer: Any, case: Case, handle: Any, seed: int) -> None:
    ys = case.expert_rows(seed, case.xs[0].dtype)
    grads = [weight_grads(rank, (len(y),), seed) for rank, y in enumerate(ys)]
    tokens, slot_grads = case.combined(job, ys, weight_grads=grads)
    out, nothing = buffer.combine_with_unpermute(hidden=job.here(ys[job.rank]), handle=handle, pad_multiple=None)
    assert nothing is None
    assert_bits(out, tokens, "combine")
    out, out_grads = buffer.combine_with_unpermute(
        hidden=job.here(ys[job.rank]), probs=job.here(grads[job.rank]), handle=handle
    )
    assert_bits(out, tokens, "combine with probs: hidden")
    expected = torch.zeros(out_grads.shape)
    for token, row in enumerate(case.work.topk_idx[job.rank].tolist()):
        for slot, expert in enumerate(row):
            if expert >= 0:
                expected[token, expert] = slot_grads[token, slot]
    assert_bits(out_grads, expected, "combine with probs: probs")


def check_again(job: Job, buffer: Any, case: Case, got: Any, seed: int) -> None:
    """By handle; Megatron-Core passes the number of rows as a tensor."""
    again = case.again(seed, case.xs[0].dtype)
    x, probs, scales, counts, handle = buffer.dispatch_with_permute(
        hidden=job.here(again.xs[job.rank]),
        scaling_factor=None,
        handle=got[4],
        pad_multiple=case.alignment,
        num_permuted_tokens=got[3].sum(),
    )
    assert_bits(x, again.expected[job.rank].x, "by handle")
    assert probs is None and scales is None and handle is got[4] and counts is got[3]


def plain_rank(store: str, device: str = "cpu") -> None:
    with joined(store, device) as job:
        buffer = buffer_of(job, 12 // job.size)
        config = buffer.configurer.buffer_config
        assert (config.hidden_dim, config.num_of_experts_per_rank) == (HIDDEN, 12 // job.size)
        for seed, name in enumerate(("uniform", "uneven", "masked", "empty_rank", "all_masked", "hot")):
            for alignment in (1, 8):
                case = case_of(job, name, "grouped", alignment=alignment, seed=seed)
                got = dispatch(buffer, job, case)
                check_received(job, case, got, f"{name}, alignment {alignment}")
                check_combine(job, buffer, case, got[4], seed)
                check_again(job, buffer, case, got, seed + 9)
        assert config.max_num_of_tokens_per_rank == 19 or job.rank == job.size // 2
        case = case_of(job, "masked", "grouped")
        idx, weights = case.work.topk_idx[job.rank], case.work.topk_weights[job.rank]
        by_index = buffer.dispatch_with_permute(
            hidden=job.here(case.xs[job.rank]),
            topk_idx=job.here(idx),
            topk_weights=job.here(weights),
            num_of_experts=case.work.num_experts,
        )
        check_received(job, case, by_index, "by indices")
        check_combine(job, buffer, case, by_index[4], 1)
        routing_map, probs = indices_to_map(job.here(idx), job.here(weights), len(idx), case.work.num_experts)
        assert_bits(routing_map, dense(case, job.rank)[0], "indices_to_map: map")
        assert_bits(probs, dense(case, job.rank)[1], "indices_to_map: probs")


def uneven_maps_rank(store: str, device: str = "cpu") -> None:
    """Tokens with more experts than any had in the first call, as capacity and padding make them."""
    with joined(store, device) as job:
        buffer = buffer_of(job, 12 // job.size)
        small = case_of(job, "uniform", "grouped", num_topk=2)
        check_received(job, small, dispatch(buffer, job, small), "first call")
        for num_topk in (5, 12):
            # Whole numbers up to 8: sums are exact, whatever their order.
            case = case_of(job, "masked", "grouped", num_topk=num_topk, dtype=torch.float32, alignment=8)
            case = Case(case.work, [x.clamp(-8, 8).round() for x in case.xs], "grouped", 8)
            got = dispatch(buffer, job, case)
            check_received(job, case, got, f"K={num_topk}")
            ys = [torch.nan_to_num(received.x, nan=0.0) * 2 for received in case.expected]
            grads = [weight_grads(rank, (len(y),), 1) for rank, y in enumerate(ys)]
            tokens, slot_grads = case.combined(job, ys, weight_grads=grads)
            out, out_grads = buffer.combine_with_unpermute(
                hidden=job.here(ys[job.rank]), probs=job.here(grads[job.rank]), handle=got[4]
            )
            assert torch.equal(out.cpu(), tokens), "zeros may have another sign"
            idx = case.work.topk_idx[job.rank]
            column = torch.where(idx < 0, 12, idx)
            expected = torch.zeros(len(idx), 13).scatter_(1, column, slot_grads)[:, :12]
            assert torch.equal(out_grads.cpu(), expected)
            assert len(got[4].lines.topk_idx) > len(idx)
            again = Case(case.work, [x + 1 for x in case.xs], "grouped", 8)
            x, *_ = buffer.dispatch_with_permute(hidden=job.here(again.xs[job.rank]), handle=got[4])
            assert_bits(x, again.expected[job.rank].x, "by handle")


def limit_rank(store: str, device: str = "cpu") -> None:
    """The static mode: a number of rows from the client, what does not fit is dropped and flagged."""
    with joined(store, device) as job:
        buffer = buffer_of(job, 12 // job.size)
        case = case_of(job, "uniform", "grouped", alignment=8, dtype=torch.float32)
        expected = case.expected[job.rank]
        counts, num_rows = aligned(case, job.rank), len(expected.source)
        for limit in (num_rows + 16, counts[0] + 8):
            x, probs, _, kept, handle = dispatch(buffer, job, case, num_permuted_tokens=limit, non_blocking=True)
            fit = min(limit, num_rows)
            assert len(x) == len(probs) == limit and handle[-1].tolist() == [int(limit < num_rows)]
            assert_bits(x[:fit], expected.x[:fit], "rows that fit")
            assert_bits(probs[:fit], expected.row_weights[:fit], "weights that fit")
            assert not bool(x[fit:].any()) and not bool(probs[fit:].any())
            assert kept.tolist() == (counts if fit == num_rows else [counts[0], 8, *[0] * (len(counts) - 2)])
            # All ranks but this one may have another limit: rows that were dropped count as zeros.
            ys = case.expert_rows(2, torch.float32)
            for rank, y in enumerate(ys):
                own = len(case.expected[rank].source)
                y[min(own, own + 16 if limit > num_rows else aligned(case, rank)[0] + 8) :] = 0
            y = torch.zeros(limit, HIDDEN)
            y[:fit] = ys[job.rank][:fit]
            out, _ = buffer.combine_with_unpermute(hidden=job.here(y), handle=handle)
            assert_bits(out, case.combined(job, ys)[0], "combine")
        for wrong in (None, 9):
            with pytest.raises(ConfigError, match="non_blocking needs num_permuted_tokens"):
                dispatch(buffer, job, case, num_permuted_tokens=wrong, non_blocking=True)


def formats_rank(store: str, device: str = "cpu") -> None:
    """E4M3 as such and as bytes; without probabilities; the refused."""
    with joined(store, device) as job:
        buffer = buffer_of(job, 12 // job.size)
        case = case_of(job, "uniform", "grouped", alignment=8, fp8="fp32")
        expected = case.expected[job.rank]
        q, scales = map(job.here, quantize_e4m3(case.xs[job.rank]))
        for hidden in (q, q.view(torch.uint8)):
            x, probs, x_scales, _, handle = dispatch(
                buffer, job, case, hidden=hidden, scaling_factor=scales, probs=None, use_fp8=True
            )
            assert x.dtype == hidden.dtype and probs is None
            assert_bits(x.view(torch.float8_e4m3fn), expected.x, "fp8: x")
            assert_bits(x_scales, expected.scales, "fp8: scales")
            x, *_ = buffer.dispatch_with_permute(hidden=hidden, scaling_factor=scales, handle=handle)
            assert_bits(x.view(torch.float8_e4m3fn), expected.x, "fp8 by handle")
        with pytest.raises(NotImplementedError, match="use dispatch_with_permute"):
            buffer.dispatch(hidden=q)
        with pytest.raises(NotImplementedError, match="use dispatch_with_permute"):
            buffer.combine(q)
        with pytest.raises(ConfigError, match="needs routing_map"):
            buffer.dispatch_with_permute(hidden=q)
        with pytest.raises(ConfigError, match="needs a handle"):
            buffer.combine_with_unpermute(hidden=q)
