"""The specification: dispatch and combine as pure functions over all ranks' inputs.

It says which rows go where, in which order, and how a combine rounds, bit by bit. It shares no code with what it
specifies: offsets, scales and sums are computed here in their own, slow and plain way.

`xs[r]`, `topk_idxs[r]` and so on are rank r's tensors. Expert e lives on rank `e // (num_experts // num_ranks)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from commlib.errors import ConfigError

__all__ = ["ReferenceDispatch", "combine", "combine_error_bound", "combine_f64", "dispatch", "fma_f32"]


@dataclass(frozen=True, kw_only=True)
class ReferenceDispatch:
    """What one rank receives: P rows.

    Attributes:
        x: [P, H]; dtype of the inputs, or float8_e4m3fn. Padding rows are zero.
        scales: FP32 [P, H / 128] with FP8 (0 in padding rows), else None.
        row_weights: "grouped": FP32 [P], the routing weight of the row's (token, slot), 0 in padding; "rows": None.
        topk_idx: "rows": int64 [P, K], local expert ids in the slots of the token, -1 elsewhere; "grouped": None.
        topk_weights: "rows": FP32 [P, K], 0 where `topk_idx` is -1; "grouped": None.
        num_tokens_per_expert: rows of each local expert, without padding.
        source: int64 [P, 3] = source rank, token, slot; slot is -1 in "rows"; all -1 in padding.
    """

    x: Tensor
    scales: Tensor | None
    row_weights: Tensor | None
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    num_tokens_per_expert: list[int]
    source: Tensor


def _num_local_experts(num_experts: int, num_ranks: int) -> int:
    if num_ranks < 1 or num_experts % num_ranks:
        raise ConfigError(f"num_experts={num_experts} is not divisible by num_ranks={num_ranks}")
    return num_experts // num_ranks


def _check_inputs(xs: Sequence[Tensor], idxs: Sequence[Tensor], weightss: Sequence[Tensor], num_experts: int) -> None:
    for rank, (x, idx, weights) in enumerate(zip(xs, idxs, weightss, strict=True)):
        if x.ndim != 2 or idx.ndim != 2 or idx.shape != weights.shape or idx.shape[0] != x.shape[0]:
            raise ConfigError(
                f"rank {rank}: x {list(x.shape)}, topk_idx {list(idx.shape)} and topk_weights {list(weights.shape)} "
                "do not fit together"
            )
        wrong = idx[(idx < -1) | (idx >= num_experts)]
        if wrong.numel():
            raise ConfigError(f"rank {rank}: topk_idx holds {int(wrong[0])}, the rule: -1..{num_experts - 1}")


def _cast_fp8(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """E4M3 by its definition: 3 mantissa bits, exponents from -6, at most 448; 1x128 blocks."""
    num_tokens, hidden = x.shape
    if hidden % 128:
        raise ConfigError(f"hidden={hidden} is not a multiple of 128, which FP8 needs")
    q, scales = torch.zeros(num_tokens, hidden), torch.zeros(num_tokens, hidden // 128)
    for block in range(hidden // 128):
        values = x[:, block * 128 : (block + 1) * 128].float()
        amax = torch.nan_to_num(values.abs(), nan=0.0, posinf=torch.inf).max(dim=1).values
        scale = torch.maximum(amax, torch.full_like(amax, 1e-4)) / torch.full_like(amax, 448.0)
        if power_of_two:
            mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
            ceiled = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
            scale = torch.where(torch.isinf(scale), scale, ceiled)
        ratio = values / scale[:, None]
        step = torch.ldexp(torch.ones_like(ratio), torch.clamp_min(torch.frexp(ratio).exponent - 1, -6) - 3)
        q[:, block * 128 : (block + 1) * 128] = torch.clamp(torch.round(ratio / step) * step, -448.0, 448.0)
        scales[:, block] = scale
    return q.to(torch.float8_e4m3fn), scales


def _gather(rows: Tensor, picked: Tensor) -> Tensor:
    """`rows[picked]`, zeros where `picked` is -1; by bytes, because FP8 tensors cannot be indexed everywhere."""
    plain = rows.contiguous().view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows
    out = torch.zeros(picked.shape[0], *plain.shape[1:], dtype=plain.dtype)
    out[picked >= 0] = plain[picked[picked >= 0]]
    return out.view(rows.dtype)


def _grouped_source(topk_idxs: Sequence[Tensor], experts: range, alignment: int) -> tuple[Tensor, list[int]]:
    """[P, 3]: experts ascending, in each (source rank, token, slot) ascending, then -1 up to the alignment."""
    parts: list[Tensor] = []
    counts: list[int] = []
    for expert in experts:
        count = 0
        for source, idx in enumerate(topk_idxs):
            found = torch.nonzero(idx == expert)
            parts.append(torch.cat([torch.full((len(found), 1), source), found], dim=1))
            count += len(found)
        counts.append(count)
        parts.append(torch.full((-count % alignment, 3), -1))
    return torch.cat(parts), counts


def _rows_source(topk_idxs: Sequence[Tensor], experts: range) -> tuple[Tensor, list[int]]:
    """[P, 3]: (source rank, token) ascending, one row per token with an expert here."""
    parts: list[Tensor] = []
    for source, idx in enumerate(topk_idxs):
        tokens = torch.nonzero(((idx >= experts.start) & (idx < experts.stop)).any(dim=1))
        parts.append(torch.cat([torch.full_like(tokens, source), tokens, torch.full_like(tokens, -1)], dim=1))
    return torch.cat(parts), [sum(int((idx == expert).sum()) for idx in topk_idxs) for expert in experts]


def _received(
    experts: range,
    sent: tuple[Tensor, Tensor | None, Sequence[Tensor], Tensor],
    layout: str,
    alignment: int,
) -> ReferenceDispatch:
    """What the rank with `experts` gets.

    `sent` = rows [sum T, H] and scales of all ranks one after another, `topk_idx` per rank, `topk_weights` [sum T, K].
    """
    all_x, all_scales, idxs, all_weights = sent
    is_grouped = layout == "grouped"
    source, counts = _grouped_source(idxs, experts, alignment) if is_grouped else _rows_source(idxs, experts)
    first_token = torch.tensor([0, *map(len, idxs)]).cumsum(0)
    is_row = source[:, 0] >= 0
    token = torch.where(is_row, first_token[source[:, 0]] + source[:, 1], -1)
    row_weights = local_idx = local_weights = None
    if is_grouped:
        row_weights = torch.zeros(len(source))
        row_weights[is_row] = all_weights[token[is_row], source[is_row, 2]]
    else:
        idx = torch.cat(list(idxs))[token]
        is_local = (idx >= experts.start) & (idx < experts.stop)
        local_idx = torch.where(is_local, idx - experts.start, -1)
        local_weights = torch.where(is_local, all_weights[token], 0.0)
    return ReferenceDispatch(
        x=_gather(all_x, token),
        scales=None if all_scales is None else _gather(all_scales, token),
        row_weights=row_weights,
        topk_idx=local_idx,
        topk_weights=local_weights,
        num_tokens_per_expert=counts,
        source=source,
    )


def dispatch(
    xs: Sequence[Tensor],
    topk_idxs: Sequence[Tensor],
    topk_weightss: Sequence[Tensor],
    num_experts: int,
    *,
    layout: str,
    expert_alignment: int = 1,
    fp8: str | None = None,
) -> list[ReferenceDispatch]:
    """Every rank's received rows.

    Row order: "grouped" = local expert ascending, then (source rank, token) ascending, each expert's rows padded with
    zeros to a multiple of `expert_alignment`; "rows" = (source rank, token) ascending.

    Args:
        xs: per rank [T_r, H].
        topk_idxs: per rank integers [T_r, K], expert ids or -1 (masked).
        topk_weightss: per rank FP32 [T_r, K]; ignored where masked.
        num_experts: experts over all ranks.
        layout: "grouped" or "rows".
        expert_alignment: see above; ignored for "rows".
        fp8: None, or the kind of scales to cast with before sending: "fp32" or "pow2" (powers of two). Per 128
            columns `s = max(|x|, 1e-4) / 448` in FP32 and `q = e4m3(x / s)`; see `commlib.quant.quantize_e4m3`.

    Raises:
        ConfigError: inputs that do not fit together.
    """
    num_ranks = len(xs)
    num_local_experts = _num_local_experts(num_experts, num_ranks)
    _check_inputs(xs, topk_idxs, topk_weightss, num_experts)
    if layout not in ("grouped", "rows") or fp8 not in (None, "fp32", "pow2"):
        raise ConfigError(f"layout={layout!r} must be grouped|rows and fp8={fp8!r} None|fp32|pow2")
    idxs = [idx.long() for idx in topk_idxs]
    all_x, all_scales = torch.cat(list(xs)), None
    if fp8 is not None:
        all_x, all_scales = _cast_fp8(all_x, fp8 == "pow2")
    all_weights = torch.cat([weights.float() for weights in topk_weightss])
    return [
        _received(
            range(rank * num_local_experts, (rank + 1) * num_local_experts),
            (all_x, all_scales, idxs, all_weights),
            layout,
            expert_alignment,
        )
        for rank in range(num_ranks)
    ]


def fma_f32(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """`a * b + c` with one rounding to FP32, as IEEE 754 fusedMultiplyAdd does; all FP32, shapes broadcast.

    The product of two FP32 numbers is exact in FP64 (48 of 53 bits, exponents far inside). The FP64 sum is not, and
    rounding it again to FP32 could err. So it is rounded to odd instead: an inexact sum takes the odd one of its two
    FP64 neighbours, from which the rounding to FP32 (at least 2 bits shorter) equals that of the exact sum (Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Transactions on Computers 57(4), 2008).
    """
    product = a.double() * b.double()
    c64 = c.double()
    total = product + c64
    # Knuth's two-sum: product + c = total + error, exactly.
    c_part = total - product
    error = (product - (total - c_part)) + (c64 - c_part)
    bits = total.view(torch.int64)
    is_inexact = torch.isfinite(total) & torch.isfinite(error) & (error != 0) & (bits & 1 == 0)
    # Neighbours of a float are neighbours as integers: away from zero is + 1.
    step = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(is_inexact, bits + step, bits).view(torch.float64).float()


def _round(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).float()


def _add(total: Tensor, has_total: Tensor, term: Tensor, has_term: Tensor) -> tuple[Tensor, Tensor]:
    """FP32 sum per token (first axis); a token's first term is assigned: 0 + -0 would lose the sign."""
    both = (has_total & has_term)[:, None]
    only_term = (~has_total & has_term)[:, None]
    return torch.where(both, total + term, torch.where(only_term, term, total)), has_total | has_term


def _rank_partial(y: Tensor, weights: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Step 1 for the tokens of one source on one rank.

    Args:
        y: [P, H], the rank's rows.
        weights: FP32 [P] or None.
        rows: int64 [T, J], the rows of each token in order of summation, -1 at the end.

    Returns:
        (FP32 [T, H], bool [T]: whether the token has a row here).
    """
    acc = torch.zeros(rows.shape[0], y.shape[1])
    for j in range(rows.shape[1]):
        tokens = torch.nonzero(rows[:, j] >= 0)[:, 0]
        picked = rows[tokens, j]
        value = y[picked].float()
        if weights is None:
            acc[tokens] = value if j == 0 else acc[tokens] + value
        else:
            w = weights[picked].float()[:, None]
            acc[tokens] = w * value if j == 0 else fma_f32(w, value, acc[tokens])
    return _round(acc, y.dtype), rows[:, 0] >= 0


def _rows_of_tokens(dispatched: ReferenceDispatch, source: int, num_tokens: int) -> Tensor:
    """int64 [T, J >= 1]: the rows of each token of `source`, ascending, -1 at the end.

    Ascending rows are ascending local experts in "grouped"; in "rows" there is at most one.
    """
    rows = torch.nonzero(dispatched.source[:, 0] == source)[:, 0]
    lists: list[list[int]] = [[] for _ in range(num_tokens)]
    for row, token in zip(rows.tolist(), dispatched.source[rows, 1].tolist(), strict=True):
        lists[token].append(row)
    most = max([1, *map(len, lists)])
    return torch.tensor([each + [-1] * (most - len(each)) for each in lists], dtype=torch.int64).reshape(-1, most)


def _returned_grads(
    grads: Sequence[Tensor], dispatched: Sequence[ReferenceDispatch], source: int, shape: torch.Size
) -> Tensor:
    """FP32 [T, K]: each slot's gradient from the one rank that owns it; nothing is summed."""
    out = torch.zeros(shape)
    for grad, received in zip(grads, dispatched, strict=True):
        rows = received.source[:, 0] == source
        token, slot = received.source[rows, 1], received.source[rows, 2]
        if received.topk_idx is None:
            out[token, slot] = grad[rows].float()
        else:
            out[token] = torch.where(received.topk_idx[rows] >= 0, grad[rows].float(), out[token])
    return out


def combine(
    ys: Sequence[Tensor],
    dispatched: Sequence[ReferenceDispatch],
    topk_idxs: Sequence[Tensor],
    num_experts: int,
    node_of_rank: Sequence[int],
    *,
    weights: Sequence[Tensor] | None = None,
    weight_grads: Sequence[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor | None]]:
    """Every rank's combined tokens, bit by bit.

    1. Rank partial: local experts ascending in FP32, `acc = y0; acc += y`, or with weights `acc = w0 * y0;
       acc = fma(w, y, acc)`; rounded to the payload dtype. In "rows" it is the row, times its weight if given.
    2. Node partial: ranks of the node ascending in FP32, the first assigned; rounded to the payload dtype unless the
       node is the source's own.
    3. Token: nodes ascending in FP32, the first assigned; rounded to the payload dtype. Zeros without experts.

    Args:
        ys: per rank FP32 or BF16 [P_r, H], one row per dispatched row; padding is ignored. One dtype for all.
        dispatched: what `dispatch` returned.
        topk_idxs: as given to `dispatch`.
        num_experts: as given to `dispatch`.
        node_of_rank: the node of each rank.
        weights: per rank FP32 [P_r], or None for an unweighted sum.
        weight_grads: per rank FP32 [P_r] ("grouped") or [P_r, K] ("rows"): gradients of the routing weights.

    Returns:
        Per rank ([T_r, H] in the dtype of `ys`, FP32 [T_r, K] with 0 in masked slots, or None without `weight_grads`).
    """
    _num_local_experts(num_experts, len(ys))
    dtype = ys[0].dtype
    for rank, (y, received) in enumerate(zip(ys, dispatched, strict=True)):
        if y.dtype != dtype or y.shape[0] != received.source.shape[0]:
            expected = f"{dtype} [{received.source.shape[0]}, hidden]"
            raise ConfigError(f"rank {rank}: y is {y.dtype} {list(y.shape)}, the rule: {expected}")
    results: list[tuple[Tensor, Tensor | None]] = []
    for source, idx in enumerate(topk_idxs):
        num_tokens, hidden = idx.shape[0], ys[source].shape[1]
        total, has_total = torch.zeros(num_tokens, hidden), torch.zeros(num_tokens, dtype=torch.bool)
        for node in sorted(set(node_of_rank)):
            node_sum, has_node = torch.zeros(num_tokens, hidden), torch.zeros(num_tokens, dtype=torch.bool)
            for rank in (rank for rank in range(len(ys)) if node_of_rank[rank] == node):
                rows = _rows_of_tokens(dispatched[rank], source, num_tokens)
                partial, has_partial = _rank_partial(ys[rank], None if weights is None else weights[rank], rows)
                node_sum, has_node = _add(node_sum, has_node, partial, has_partial)
            if node != node_of_rank[source]:
                node_sum = _round(node_sum, dtype)
            total, has_total = _add(total, has_total, node_sum, has_node)
        grads = None if weight_grads is None else _returned_grads(weight_grads, dispatched, source, idx.shape)
        results.append((total.to(dtype), grads))
    return results


def _flat_sum(
    ys: Sequence[Tensor],
    dispatched: Sequence[ReferenceDispatch],
    topk_idxs: Sequence[Tensor],
    weights: Sequence[Tensor] | None,
    magnitudes: bool,
) -> list[Tensor]:
    sums = [torch.zeros(idx.shape[0], y.shape[1], dtype=torch.float64) for idx, y in zip(topk_idxs, ys, strict=True)]
    for rank, (y, received) in enumerate(zip(ys, dispatched, strict=True)):
        terms = y.double() if weights is None else weights[rank].double()[:, None] * y.double()
        for source, out in enumerate(sums):
            rows = received.source[:, 0] == source
            out.index_add_(0, received.source[rows, 1], terms[rows].abs() if magnitudes else terms[rows])
    return sums


def combine_f64(
    ys: Sequence[Tensor],
    dispatched: Sequence[ReferenceDispatch],
    topk_idxs: Sequence[Tensor],
    *,
    weights: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The same sums without tiers or payload rounding: per rank FP64 [T_r, H]. Arguments as for `combine`."""
    return _flat_sum(ys, dispatched, topk_idxs, weights, False)


def combine_error_bound(
    ys: Sequence[Tensor],
    dispatched: Sequence[ReferenceDispatch],
    topk_idxs: Sequence[Tensor],
    *,
    weights: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """How far `combine` may lie from `combine_f64`: per rank FP64 [T_r, H]. Valid unless a sum overflows.

    Derivation. Let a token have n <= K terms w_i y_i. Round to nearest gives fl(z) = z (1 + d) + e with |d| <= u and
    d e = 0; u = 2^-24 in FP32; v = 2^-8 for a BF16 payload and v = 0 for FP32, where nothing is left to round.

    Relative part. The sum is a binary tree with n leaves: a term passes at most n - 1 FP32 additions (an fma rounds
    product and addition at once), at most one rounding of a product of its own, and the 3 payload roundings (rank,
    node, token). Hence computed = sum w_i y_i prod(1 + d), each term with at most n factors |d| <= u and 3 with
    |d| <= v, and |computed - exact| <= A S with A = (1 + u)^K (1 + v)^3 - 1 and S = sum |w_i y_i|.

    Underflow part. FP32 additions are exact when they underflow. Products and fmas err by |e| <= 2^-150, at most K
    times; BF16 roundings by |e| <= 2^-134 (half the smallest subnormal), at most K (rank) + K (node) + 1 times.
    Later roundings magnify each by at most 1 + A.

    The FP64 sum itself errs by at most ((1 + 2^-53)^K - 1) S, products being exact (48 bits). The last factor covers
    the roundings of this function's own FP64 arithmetic, which are fewer than 2^13 for any K <= 64.
    """
    num_topk = topk_idxs[0].shape[1]
    is_bf16 = ys[0].dtype == torch.bfloat16
    payload_unit = 2.0**-8 if is_bf16 else 0.0
    payload_underflow = 2.0**-134 if is_bf16 else 0.0
    relative = (1 + 2.0**-24) ** num_topk * (1 + payload_unit) ** 3 - 1
    absolute = (1 + relative) * (num_topk * 2.0**-150 + (2 * num_topk + 1) * payload_underflow)
    relative_f64 = 2 * num_topk * 2.0**-53
    magnitudes = _flat_sum(ys, dispatched, topk_idxs, weights, True)
    return [((relative + relative_f64) * magnitude + absolute) * (1 + 2.0**-40) for magnitude in magnitudes]
