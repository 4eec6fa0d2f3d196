import ctypes
import ctypes.util

import numpy as np
import pytest
import torch

from commlib import quant, reference
from commlib.errors import ConfigError
from commlib.reference import ReferenceDispatch
from commlib.testing.payloads import assert_identity, identity_payload, random_payload
from commlib.testing.workloads import WORKLOADS, Workload, make_workload

NODES = (0, 1, 0, 2)


def libm_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    libm = ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")
    libm.fmaf.restype = ctypes.c_float
    libm.fmaf.argtypes = [ctypes.c_float] * 3
    return np.array([libm.fmaf(*each) for each in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], np.float32)


def assert_fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> None:
    ours = reference.fma_f32(*map(torch.from_numpy, (a, b, c))).numpy()
    theirs = libm_fma(a, b, c)
    is_nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), is_nan)
    np.testing.assert_array_equal(ours[~is_nan].view(np.uint32), theirs[~is_nan].view(np.uint32))


def test_fma_on_random_bit_patterns() -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.integers(0, 2**32, 4_000, dtype=np.uint32).view(np.float32) for _ in range(3))
    assert_fma(a, b, c)


def test_fma_on_cancellation_and_similar_scales() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(4_000).astype(np.float32) for _ in range(2))
    noise = (1 + rng.integers(-4, 5, 4_000) * 2.0**-23).astype(np.float32)
    assert_fma(a, b, -(a * b))
    assert_fma(a, b, -(a * b) * noise)
    assert_fma(a, b, (a * b) * np.exp2(rng.integers(-60, 60, 4_000)).astype(np.float32))


def test_fma_on_subnormal_results() -> None:
    rng = np.random.default_rng(2)
    a = (rng.standard_normal(4_000) * 2.0**-70).astype(np.float32)
    b = (rng.standard_normal(4_000) * 2.0**-70).astype(np.float32)
    c = (rng.integers(-1000, 1000, 4_000) * 2.0**-149).astype(np.float32)
    assert_fma(a, b, c)
    # Products exactly half way between two subnormals, alone and nudged by a term far below.
    odd = (rng.integers(0, 1000, 4_000) * 2 + 1).astype(np.float32)
    assert_fma(odd * np.float32(2.0**-100), np.full_like(odd, 2.0**-50), c)


def test_fma_where_rounding_twice_errs() -> None:
    # 1 + 2^-24 lies half way between two FP32 numbers; a term too small for FP64 decides.
    half = np.float32(2.0**-24)
    a = np.array([1, 1, 1 + 2.0**-12, -1, 1 + 2.0**-23], np.float32)
    b = np.array([half, half, 1 + 2.0**-12, half, half], np.float32)
    c = np.array([1, 1 + 2.0**-23, 2.0**-60, -1, 1], np.float32)
    assert_fma(a, b, c)
    # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24: a tie that only 2^-60 breaks, which FP64 rounds away.
    naive = (a.astype(np.float64) * b + c).astype(np.float32)
    assert naive[2] != libm_fma(a, b, c)[2], "the naive way happens to be right: no test of the correction"


def test_fma_special_values() -> None:
    special = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-45, -1e-45], np.float32)
    grid = np.array(np.meshgrid(special, special, special)).reshape(3, -1)
    assert_fma(*map(np.ascontiguousarray, grid))


def by_hand() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """2 ranks, 4 experts (2 each), 2 slots; x says rank and token."""
    xs = [torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]), torch.tensor([[4.0, 40.0], [5.0, 50.0]])]
    idxs = [torch.tensor([[1, 0], [3, 1], [-1, 2]]), torch.tensor([[0, -1], [2, 1]])]
    weights = [torch.tensor([[0.1, 0.2], [0.3, 0.4], [9.0, 0.5]]), torch.tensor([[0.6, 9.0], [0.7, 0.8]])]
    return xs, idxs, weights


def test_grouped_by_hand() -> None:
    xs, idxs, weights = by_hand()
    first, second = reference.dispatch(xs, idxs, weights, 4, layout="grouped", expert_alignment=2)
    assert first.num_tokens_per_expert == [2, 3] and second.num_tokens_per_expert == [2, 1]
    assert first.x[:, 0].tolist() == [1, 4, 1, 2, 5, 0]
    assert first.source.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 1, 1], [1, 1, 1], [-1, -1, -1]]
    assert first.row_weights is not None
    assert torch.equal(first.row_weights, torch.tensor([0.2, 0.6, 0.1, 0.4, 0.8, 0.0]))
    assert second.x.tolist() == [[3, 30], [5, 50], [2, 20], [0, 0]]
    assert second.source.tolist() == [[0, 2, 1], [1, 1, 0], [0, 1, 0], [-1, -1, -1]]
    assert (first.topk_idx, first.topk_weights, first.scales) == (None, None, None)


def test_rows_by_hand() -> None:
    xs, idxs, weights = by_hand()
    first, second = reference.dispatch(xs, idxs, weights, 4, layout="rows", expert_alignment=128)
    assert first.x[:, 0].tolist() == [1, 2, 4, 5]
    assert first.source.tolist() == [[0, 0, -1], [0, 1, -1], [1, 0, -1], [1, 1, -1]]
    assert first.topk_idx is not None and first.topk_weights is not None and first.row_weights is None
    assert first.topk_idx.tolist() == [[1, 0], [-1, 1], [0, -1], [-1, 1]]
    assert torch.equal(first.topk_weights, torch.tensor([[0.1, 0.2], [0.0, 0.4], [0.6, 0.0], [0.0, 0.8]]))
    assert first.num_tokens_per_expert == [2, 3]
    assert second.topk_idx is not None
    assert second.topk_idx.tolist() == [[1, -1], [-1, 0], [0, -1]]


def test_combine_by_hand() -> None:
    xs, idxs, weights = by_hand()
    received = reference.dispatch(xs, idxs, weights, 4, layout="grouped", expert_alignment=2)
    # Powers of two: sums are exact and tell which rows are in them.
    ys = [torch.tensor([[2.0**i] for i in range(6)]), torch.tensor([[2.0**i] for i in range(6, 10)])]
    (first, _), (second, _) = reference.combine(ys, received, idxs, 4, (0, 0))
    assert first.tolist() == [[1 + 4], [8 + 256], [64]]
    assert second.tolist() == [[2], [16 + 128]]
    grads = [torch.arange(6.0), torch.arange(10.0, 14.0)]
    out = reference.combine(ys, received, idxs, 4, (0, 0), weight_grads=grads)
    assert out[0][1] is not None and out[0][1].tolist() == [[2, 0], [12, 3], [0, 10]]
    assert out[1][1] is not None and out[1][1].tolist() == [[1, 0], [11, 4]]


def one_token(values: list[float], node_of_rank: tuple[int, ...], weights: list[float] | None = None) -> float:
    """Rank 0 has one token with one BF16 row per expert; experts are spread over the ranks in order."""
    num_ranks, num_experts = len(node_of_rank), len(values)
    num_local = num_experts // num_ranks
    idxs = [torch.arange(num_experts)[None, :], *[torch.empty(0, num_experts, dtype=torch.int64)] * (num_ranks - 1)]
    ones = [torch.ones(idx.shape) for idx in idxs]
    xs = [torch.zeros(len(idx), 1) for idx in idxs]
    received = reference.dispatch(xs, idxs, ones, num_experts, layout="grouped")
    ys = [torch.tensor(values).bfloat16()[r * num_local : (r + 1) * num_local, None] for r in range(num_ranks)]
    split = None if weights is None else list(torch.tensor(weights).split(num_local))
    return float(reference.combine(ys, received, idxs, num_experts, node_of_rank, weights=split)[0][0])


# BF16 around 256 has a step of 2, so 256 + 1 is a tie and rounds to 256.
@pytest.mark.parametrize(
    ("values", "node_of_rank", "expected"),
    [
        # Experts of one rank: added in FP32, rounded once.
        ([256.0, 1.0, 1.0, 0.0], (0,), 258.0),
        # The rank partial 256 + 1 rounds to 256 before the other rank's 1 arrives: 257 rounds to 256.
        ([256.0, 1.0, 1.0, 0.0], (0, 0), 256.0),
        # 4 ranks of one node: no rounding between ranks.
        ([256.0, 1.0, 1.0, 0.0], (0, 0, 0, 0), 258.0),
        # Ranks 1 and 2 on another node: their 1 + 1 is exact, then 256 + 2.
        ([256.0, 1.0, 1.0, 0.0], (0, 1, 1, 0), 258.0),
        # The other node rounds 256 + 1 to 256 before the source adds 1, and 257 rounds to 256 again.
        ([1.0, 256.0, 1.0, 0.0], (0, 1, 1, 0), 256.0),
        # The same terms on the source's own node are not rounded there.
        ([1.0, 256.0, 1.0, 0.0], (0, 0, 0, 0), 258.0),
        # The own node's 256 + 1 is not rounded: the other node's 1 makes 258. Rounded, it would be 256 + 1 -> 256.
        ([256.0, 1.0, 1.0, 0.0], (0, 0, 1, 1), 258.0),
        # Every node sends 1 by itself: the source adds in FP32.
        ([256.0, 1.0, 1.0, 0.0], (0, 1, 2, 3), 258.0),
    ],
)
def test_where_combine_rounds(values: list[float], node_of_rank: tuple[int, ...], expected: float) -> None:
    assert one_token(values, node_of_rank) == expected


def test_order_is_experts_then_ranks_then_nodes() -> None:
    big = 2.0**30
    # FP32 drops the 1 next to 2^30, so the sum tells when it was added.
    assert one_token([big, 1.0, -big, 0.0], (0,)) == 0.0
    assert one_token([big, -big, 1.0, 0.0], (0,)) == 1.0
    assert one_token([big, 1.0, -big, 0.0], (0, 0, 0, 0)) == 0.0
    assert one_token([big, -big, 1.0, 0.0], (0, 0, 0, 0)) == 1.0
    # Node 0 = ranks 0 and 2: their sum is 0, then node 1 adds 1.
    assert one_token([big, 1.0, -big, 0.0], (0, 1, 0, 1)) == 1.0
    # Nodes ascending, whichever is the source's own (0 here): 1 last, 1 first.
    assert one_token([big, -big, 1.0, 0.0], (0, 1, 2, 3)) == 1.0
    assert one_token([1.0, big, -big, 0.0], (0, 1, 2, 3)) == 0.0


def test_weighted_sum_uses_fma() -> None:
    # w0 y0 = -(1 + 2^-7), rounded to FP32 exactly; w1 y1 = (1 + 2^-23)(1 + 2^-7) is not an FP32 number.
    weight, y = 1 + 2.0**-23, 1 + 2.0**-7
    assert one_token([y, y], (0,), weights=[-1.0, weight]) == 2.0**-23 * y


def test_negative_zero_survives() -> None:
    xs, idxs = [torch.zeros(2, 1)], [torch.tensor([[0], [-1]])]
    received = reference.dispatch(xs, idxs, [torch.ones(2, 1)], 1, layout="rows")
    out = reference.combine([torch.tensor([[-0.0]])], received, idxs, 1, (0,))[0][0]
    assert torch.signbit(out).tolist() == [[True], [False]]


def dispatched(workload: Workload, layout: str, dtype: torch.dtype) -> list[ReferenceDispatch]:
    xs = [identity_payload(rank, count, 24, dtype) for rank, count in enumerate(workload.num_tokens)]
    return reference.dispatch(
        xs, workload.topk_idx, workload.topk_weights, workload.num_experts, layout=layout, expert_alignment=8
    )


def make(name: str) -> Workload:
    return make_workload(
        name, num_ranks=4, num_experts=16, num_topk=5, num_tokens=19, seed=3, node_of_rank=NODES, max_nodes=2
    )


@pytest.mark.parametrize("name", WORKLOADS)
def test_dispatch_agrees_with_counting(name: str) -> None:
    workload = make(name)
    num_local = workload.num_experts // 4
    flat = torch.cat([idx.reshape(-1) for idx in workload.topk_idx])
    grouped, rows = (dispatched(workload, layout, torch.bfloat16) for layout in ("grouped", "rows"))
    for rank in range(4):
        counts = [int((flat == e).sum()) for e in range(rank * num_local, (rank + 1) * num_local)]
        assert grouped[rank].num_tokens_per_expert == rows[rank].num_tokens_per_expert == counts
        assert len(grouped[rank].x) == sum(-(-count // 8) * 8 for count in counts)
        for received in (grouped[rank], rows[rank]):
            assert_identity(received.x, received.source)
        order = rows[rank].source.tolist()
        assert order == sorted(order) and len(set(map(tuple, order))) == len(order)


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_slot_arrives_once_with_its_weight(name: str) -> None:
    workload = make(name)
    for layout in ("grouped", "rows"):
        received = dispatched(workload, layout, torch.float32)
        weights = [r.row_weights if layout == "grouped" else r.topk_weights for r in received]
        ys = [torch.zeros(len(r.source), 1) for r in received]
        back = reference.combine(
            ys,
            received,
            workload.topk_idx,
            workload.num_experts,
            NODES,
            weight_grads=[weight for weight in weights if weight is not None],
        )
        for (_, grads), idx, sent in zip(back, workload.topk_idx, workload.topk_weights, strict=True):
            assert grads is not None and torch.equal(grads, torch.where(idx >= 0, sent, 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["grouped", "rows"])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("name", WORKLOADS)
def test_combine_lies_within_the_derived_bound(name: str, is_weighted: bool, layout: str, dtype: torch.dtype) -> None:
    workload = make(name)
    received = dispatched(workload, layout, dtype)
    ys = [random_payload(rank, len(r.source), 24, dtype, seed=1) for rank, r in enumerate(received)]
    weights = None
    if is_weighted:
        generator = torch.Generator().manual_seed(4)
        weights = [torch.rand(len(r.source), generator=generator) - 0.3 for r in received]
    outs = reference.combine(ys, received, workload.topk_idx, workload.num_experts, NODES, weights=weights)
    exact = reference.combine_f64(ys, received, workload.topk_idx, weights=weights)
    bounds = reference.combine_error_bound(ys, received, workload.topk_idx, weights=weights)
    for (out, grads), sums, bound in zip(outs, exact, bounds, strict=True):
        assert grads is None and out.dtype == dtype
        assert bool(((out.double() - sums).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["grouped", "rows"])
def test_the_bound_notices_a_lost_row(layout: str, dtype: torch.dtype) -> None:
    workload = make("masked")
    received = dispatched(workload, layout, dtype)
    # At most 5 terms in [1, 2): the bound is about 5 * 2 * 3 * 2^-8 = 0.12 in BF16, a lost row at least 1.
    generator = torch.Generator().manual_seed(5)
    ys = [(1 + 0.99 * torch.rand(len(r.source), 24, generator=generator)).to(dtype) for r in received]
    outs = reference.combine(ys, received, workload.topk_idx, workload.num_experts, NODES)
    exact = reference.combine_f64(ys, received, workload.topk_idx)
    bounds = reference.combine_error_bound(ys, received, workload.topk_idx)
    num_rows = 0
    for y, source in ((y, r.source) for y, r in zip(ys, received, strict=True)):
        for row in torch.nonzero(source[:, 0] >= 0)[:, 0].tolist():
            rank, token = source[row, :2].tolist()
            lost = outs[rank][0][token].double() - y[row].double()
            assert bool(((lost - exact[rank][token]).abs() > bounds[rank][token]).all())
            num_rows += 1
    assert num_rows > 50


@pytest.mark.parametrize("kind", ["fp32", "pow2"])
def test_fp8_agrees_with_quant(kind: str) -> None:
    workload = make("masked")
    xs = [random_payload(rank, count, 256, torch.bfloat16) for rank, count in enumerate(workload.num_tokens)]
    xs[0][1] = 0
    xs[0][2, 5] = float("nan")
    xs[1][3, 200] = float("inf")
    received = reference.dispatch(
        xs, workload.topk_idx, workload.topk_weights, 16, layout="grouped", expert_alignment=4, fp8=kind
    )
    cast = [quant.quantize_e4m3(x, pow2=kind == "pow2") for x in xs]
    for got in received:
        assert got.scales is not None and got.x.dtype == torch.float8_e4m3fn
        for row, (rank, token, _) in enumerate(got.source.tolist()):
            x, scales = got.x[row : row + 1].float(), got.scales[row]
            if rank < 0:
                assert not x.any() and not scales.any()
                continue
            assert torch.equal(scales, cast[rank][1][token])
            torch.testing.assert_close(x, cast[rank][0][token : token + 1].float(), rtol=0, atol=0, equal_nan=True)


def test_errors_name_rank_values_and_rule() -> None:
    xs, idxs, weights = by_hand()
    with pytest.raises(ConfigError, match="num_experts=5 is not divisible by num_ranks=2"):
        reference.dispatch(xs, idxs, weights, 5, layout="rows")
    with pytest.raises(ConfigError, match=r"rank 0: topk_idx holds 3, the rule: -1\.\.1"):
        reference.dispatch(xs, idxs, weights, 2, layout="rows")
    with pytest.raises(ConfigError, match="layout='columns'"):
        reference.dispatch(xs, idxs, weights, 4, layout="columns")
    with pytest.raises(ConfigError, match=r"rank 1: x \[2, 2\], topk_idx \[1, 2\]"):
        reference.dispatch(xs, [idxs[0], idxs[1][:1]], weights, 4, layout="rows")
    with pytest.raises(ConfigError, match="hidden=2 is not a multiple of 128"):
        reference.dispatch(xs, idxs, weights, 4, layout="rows", fp8="fp32")
    received = reference.dispatch(xs, idxs, weights, 4, layout="rows")
    with pytest.raises(
        ConfigError, match=r"rank 1: y is torch.float32 \[2, 2\], the rule: torch.float32 \[3, hidden\]"
    ):
        reference.combine([torch.zeros(4, 2), torch.zeros(2, 2)], received, idxs, 4, (0, 0))
