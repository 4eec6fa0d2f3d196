"""Gradients of commlib.ops on real ranks against the same MoE in one process in FP64. *_rank run on every rank."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from moe_job import HIDDEN, assert_bits, config_of, free_ports, part_of_job, wait_for
from torch import Tensor

from commlib import ops
from commlib.bootstrap import Bootstrap
from commlib.errors import ConfigError
from commlib.handle import Dispatched
from commlib.quant import dequantize, quantize_e4m3
from commlib.runtime import Runtime
from commlib.testing.payloads import random_payload
from commlib.testing.spawn import check_ranks
from commlib.testing.workloads import Workload, make_workload
from commlib.topology import Topology

pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem
NODES = (0, 0, 1, 1)
NUM_EXPERTS = 8
U32 = 2.0**-24  # unit roundoff


@dataclass(frozen=True)
class Plan:
    """What one run of the layer does. Expert e maps a row h to h * scale[e] + shift[e] (FP32 [hidden] each).

    An expert without a matrix product: a gradient then has so few roundings that they can be counted, and a row that
    went to the wrong expert, or a weight to the wrong slot, is off by a factor.
    """

    layout: str = "grouped"
    is_weighted_by_combine: bool = True
    fp8: str | None = None
    grad_fp8: str | None = None
    trains_x: bool = True
    trains_experts: bool = True
    trains_weights: bool = True
    weights_given: bool = True


@dataclass
class Layer:
    """Inputs of all ranks, so that each rank can compute everything on its own as well."""

    work: Workload
    xs: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for rank, count in enumerate(self.work.num_tokens):
            self.xs.append(random_payload(rank, count, HIDDEN, torch.float32, seed=1))
            self.targets.append(random_payload(rank, count, HIDDEN, torch.float32, seed=2))
        generator = torch.Generator().manual_seed(3)
        self.scale = torch.randn(NUM_EXPERTS, HIDDEN, generator=generator)
        self.shift = torch.randn(NUM_EXPERTS, HIDDEN, generator=generator)


@dataclass
class Gradients:
    """Of one rank: its tokens, its routing weights, its experts; None = frozen."""

    out: Tensor
    x: Tensor | None
    topk_weights: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


def masked_weights(work: Workload, rank: int, plan: Plan) -> Tensor:
    weights = work.topk_weights[rank] if plan.weights_given else torch.ones_like(work.topk_weights[rank])
    return torch.where(work.topk_idx[rank] >= 0, weights, 0.0)


# --- on the ranks -------------------------------------------------------------------------------------------------


def grouped_experts(d: Dispatched, scale: Tensor, shift: Tensor) -> Tensor:
    parts, start = [], 0
    for expert, count in enumerate(d.num_tokens_per_expert):
        rows = -(-count // 8) * 8
        parts.append(d.x[start : start + rows] * scale[expert] + shift[expert])
        start += rows
    return torch.cat(parts)


def rows_experts(d: Dispatched, scale: Tensor, shift: Tensor) -> Tensor:
    """Sums over the experts of a row here, with the routing weights."""
    total = torch.zeros_like(d.x)
    for slot in range(d.topk_idx.shape[1]):
        expert = d.topk_idx[:, slot]
        y = d.x * scale[expert.clamp_min(0)] + shift[expert.clamp_min(0)]
        total = total + torch.where((expert >= 0)[:, None], d.topk_weights[:, slot, None] * y, 0.0)
    return total


def run_layer(runtime: Runtime, layer: Layer, plan: Plan) -> Gradients:
    rank = runtime.rank
    local = slice(rank * NUM_EXPERTS // runtime.num_ranks, (rank + 1) * NUM_EXPERTS // runtime.num_ranks)
    x = layer.xs[rank].clone().requires_grad_(plan.trains_x)
    weights = layer.work.topk_weights[rank].clone().requires_grad_(plan.trains_weights)
    scale = layer.scale[local].clone().requires_grad_(plan.trains_experts)
    shift = layer.shift[local].clone().requires_grad_(plan.trains_experts)
    d = ops.dispatch(
        runtime,
        x,
        layer.work.topk_idx[rank],
        weights if plan.weights_given else None,
        layout=plan.layout,
        expert_alignment=8,
        fp8=plan.fp8,
    )
    assert d.scales is None and d.x.dtype == torch.float32
    if plan.layout == "rows":
        out = ops.combine(runtime, rows_experts(d, scale, shift), d.handle, grad_fp8=plan.grad_fp8)
    elif plan.is_weighted_by_combine:
        y = grouped_experts(d, scale, shift)
        out = ops.combine(runtime, y, d.handle, weights=d.row_weights, grad_fp8=plan.grad_fp8)
    else:
        y = grouped_experts(d, scale, shift) * d.row_weights[:, None]
        out = ops.combine(runtime, y, d.handle, grad_fp8=plan.grad_fp8)
    (out * layer.targets[rank]).sum().backward()  # type: ignore[no-untyped-call]
    return Gradients(out.detach(), x.grad, weights.grad, scale.grad, shift.grad)


# --- in one process, FP64 -----------------------------------------------------------------------------------------


def cast(rows: Tensor, kind: str | None) -> Tensor:
    """What FP8 makes of rows: exact FP32 numbers, the same on the way and here."""
    return rows if kind is None else dequantize(*quantize_e4m3(rows, pow2=kind == "pow2"), torch.float32)


def dense_all(layer: Layer, plan: Plan, *, is_magnitude: bool) -> list[Gradients]:
    """Every rank's gradients by their formulas; with `is_magnitude` the sums of the absolute values of their terms.

    out_t = sum_k w_tk (s_k x_t + b_k); with g = d loss / d out = target:
    dx_t = sum_k w_tk s_k g_t; dw_tk = g_t . (s_k x_t + b_k); ds_e = sum_tk w_tk x_t g_t; db_e = sum_tk w_tk g_t.
    """

    def term(value: Tensor) -> Tensor:
        return value.abs() if is_magnitude else value

    scale, shift = term(layer.scale.double()), term(layer.shift.double())
    per_rank = NUM_EXPERTS // len(layer.xs)
    results, d_scale, d_shift = [], torch.zeros_like(scale), torch.zeros_like(shift)
    for rank, x32 in enumerate(layer.xs):
        idx = layer.work.topk_idx[rank]
        weights = term(masked_weights(layer.work, rank, plan).double())[:, :, None]
        x = term(cast(x32, plan.fp8).double())[:, None]
        # The rows that go back to the experts are cast; the dot product with them gives the weights' gradient.
        g_back = term(cast(layer.targets[rank], plan.grad_fp8).double())[:, None]
        s, b = scale[idx.clamp_min(0)], shift[idx.clamp_min(0)]
        has = (idx >= 0)[:, :, None].double()
        y = (s * x + b) * has
        d_scale.index_add_(0, idx.clamp_min(0).flatten(), (has * weights * x * g_back).flatten(0, 1))
        d_shift.index_add_(0, idx.clamp_min(0).flatten(), (has * weights * g_back.expand_as(x)).flatten(0, 1))
        d_weights = (g_back * y).sum(dim=2)
        d_x = (weights * s * g_back * has).sum(dim=1)
        results.append(Gradients((weights * y).sum(dim=1), d_x, d_weights, None, None))
    for rank, result in enumerate(results):
        result.scale = d_scale[rank * per_rank : (rank + 1) * per_rank]
        result.shift = d_shift[rank * per_rank : (rank + 1) * per_rank]
    return results


def check_layer(runtime: Runtime, layer: Layer, plan: Plan) -> None:
    """|computed - exact| <= ((1 + u)^n - 1) S, where S is the sum of the magnitudes of the terms of a sum of products.

    A term passes its own roundings and, whatever the order, at most one addition less than there are terms (zeros of
    padding and masked slots add exactly). With K = 3 slots that makes n
    * out: 2 for s * x + b, 1 for w, K - 1 additions over experts, ranks and nodes: 5; dx: 1 for w, 1 for s, K - 1: 4;
    * dw: 2 for s * x + b, 1 for g, hidden - 1;
    * ds, db: 1 for w, 1 for x, and one less than an expert can have rows.

    Nothing underflows (the numbers are above 2^-40); the last factor covers the roundings of the FP64 side.
    """
    own = run_layer(runtime, layer, plan)
    exact = dense_all(layer, plan, is_magnitude=False)[runtime.rank]
    size = dense_all(layer, plan, is_magnitude=True)[runtime.rank]
    rows = sum(layer.work.num_tokens)
    for name, n, is_there in (
        ("out", 5, True),
        ("x", 4, plan.trains_x),
        ("topk_weights", HIDDEN + 2, plan.trains_weights and plan.weights_given),
        ("scale", rows + 1, plan.trains_experts),
        ("shift", rows + 1, plan.trains_experts),
    ):
        actual, what = getattr(own, name), f"rank {runtime.rank}, {plan}: gradient of {name}"
        if not is_there:
            assert actual is None, what
            continue
        assert actual is not None, what
        bound = ((1 + U32) ** n - 1) * getattr(size, name) * (1 + 2.0**-20)
        excess = (actual.double() - getattr(exact, name)).abs() - bound
        assert not bool((excess > 0).any()) and not bool(actual.isnan().any()), f"{what}: {excess.max()} over the bound"


PLANS = [
    Plan(),
    Plan(is_weighted_by_combine=False),
    Plan(layout="rows"),
    Plan(fp8="fp32"),
    Plan(grad_fp8="pow2"),
    Plan(layout="rows", fp8="pow2", grad_fp8="fp32"),
    Plan(trains_x=False),
    Plan(trains_experts=False),
    Plan(trains_weights=False),
    Plan(trains_x=False, trains_weights=False, layout="rows"),
    Plan(weights_given=False),
]


def layer_of(name: str, num_tokens: int = 13) -> Layer:
    return Layer(
        make_workload(name, num_ranks=4, num_experts=NUM_EXPERTS, num_topk=3, num_tokens=num_tokens, node_of_rank=NODES)
    )


def open_for(layer: Layer, group: Bootstrap) -> Runtime:
    return Runtime(group, config_of(layer.work, timeout_s=20.0), topology=Topology(NODES))


def check_mixed_freezing(runtime: Runtime, layer: Layer) -> None:
    """Ranks differ in what they train; the backward is collective all the same."""
    for rank_that_differs in range(2):
        is_odd = runtime.rank % 2 == rank_that_differs
        check_layer(runtime, layer, Plan(trains_x=is_odd, trains_experts=not is_odd, trains_weights=is_odd))
    frozen = Plan(trains_x=False, trains_experts=False, trains_weights=False)
    check_layer(runtime, layer, frozen if runtime.rank == 1 else Plan())


def check_rank_without_rows(runtime: Runtime) -> None:
    """All tokens go to ranks 0 to 2; rank 3 makes its (empty) y without touching d.x, rank 2 a constant one."""
    rank = runtime.rank
    idx = torch.stack([(torch.arange(9) + k * 2) % 6 for k in range(3)], dim=1)
    for layout in ("grouped", "rows"):
        x = random_payload(rank, 9, HIDDEN, torch.float32, seed=1).requires_grad_()
        weights = torch.full((9, 3), 0.25, requires_grad=True)
        d = ops.dispatch(runtime, x, idx, weights, layout=layout, expert_alignment=1)
        if rank >= 2:
            assert (len(d.x) == 0) == (rank == 3)
            y = torch.ones(len(d.x), HIDDEN)
        else:
            y = d.x * 2
        out = ops.combine(runtime, y, d.handle)
        out.sum().backward()  # type: ignore[no-untyped-call]
        # Each token has experts on ranks 0, 1 and 2: one of each (idx, idx + 2, idx + 4 modulo 6).
        assert x.grad is not None and weights.grad is not None
        assert_bits(x.grad, torch.full((9, HIDDEN), 4.0), f"rank {rank}, {layout}: x.grad")
        assert_bits(weights.grad, torch.zeros(9, 3), f"rank {rank}, {layout}: weights.grad")
        assert_bits(out.detach(), 2 * x.detach() + 2 * x.detach() + 1, f"rank {rank}, {layout}: out")


def check_misuse(runtime: Runtime) -> None:
    plain = runtime.dispatch(torch.zeros(1, HIDDEN), torch.tensor([[0, 1, 2]]))
    with pytest.raises(ConfigError, match=r"ops\.combine needs the handle of ops\.dispatch, not a Handle"):
        ops.combine(runtime, plain.x, plain.handle)
    with torch.no_grad():
        d = ops.dispatch(runtime, torch.ones(1, HIDDEN), torch.tensor([[0, 3, 6]]), expert_alignment=1)
        out = ops.combine(runtime, d.x, d.handle)
    assert not out.requires_grad and bool((out == 3).all())


def check_leaks(runtime: Runtime, layer: Layer) -> None:
    """50 training steps: the arena's use comes back to its start each time, no cycle keeps anything."""
    gc.collect()
    start = runtime.memory()
    gc.disable()  # only reference counts may free
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for step in range(50):
            run_layer(runtime, layer, PLANS[step % 6])
            assert wait_for(lambda: runtime.memory().arena_used_bytes == start.arena_used_bytes), step
            if step == 10:
                warm = runtime.memory()
        gc.collect()
        leaked = [each for each in gc.garbage if "commlib" in str(type(each)) or isinstance(each, Tensor)]
        assert leaked == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert runtime.memory() == warm


def check_finite_differences(runtime: Runtime, group: Bootstrap, layer: Layer) -> None:
    """The loss is linear in every single input: a difference of any size gives the slope, up to rounding.

    A loss errs by at most ((1 + u)^5 - 1) times the magnitude of its terms (see check_layer), summed in FP64.
    """

    def loss(x: Tensor, weights: Tensor) -> float:
        with torch.no_grad():
            d = ops.dispatch(runtime, x, layer.work.topk_idx[runtime.rank], weights, expert_alignment=8)
            first = runtime.rank * NUM_EXPERTS // 4
            y = grouped_experts(d, layer.scale[first : first + 2], layer.shift[first : first + 2])
            out = ops.combine(runtime, y, d.handle, weights=d.row_weights)
            own = float((out.double() * layer.targets[runtime.rank].double()).sum())
        return sum(float(part) for part in group.allgather(repr(own).encode(), timeout_s=30))

    own = run_layer(runtime, layer, Plan())
    sizes = dense_all(layer, Plan(), is_magnitude=True)
    total = sum(float((size.out * t.double().abs()).sum()) for size, t in zip(sizes, layer.targets, strict=True))
    inputs = {"x": layer.xs[runtime.rank], "topk_weights": layer.work.topk_weights[runtime.rank]}
    for changed_rank in (0, 3):
        for name, step in (("x", 64.0), ("topk_weights", 0.5)):
            grad = getattr(own, name)
            place = divmod(int(grad.abs().argmax()), grad.shape[1])
            moved = dict(inputs, **{name: inputs[name].clone()})
            if runtime.rank == changed_rank:
                moved[name][place] += step
            slope_loss = loss(moved["x"], moved["topk_weights"]) - loss(inputs["x"], inputs["topk_weights"])
            if runtime.rank != changed_rank:
                continue
            step = float(moved[name][place].double() - inputs[name][place].double())
            slope, slope_size = slope_loss / step, float(getattr(sizes[changed_rank], name)[place])
            relative = (1 + U32) ** 5 - 1
            bound = relative * (2 * total / step + slope_size) + ((1 + U32) ** (HIDDEN + 2) - 1) * slope_size
            assert bound < 0.1 * abs(float(grad[place])), f"{name}: this step shows nothing: {bound} of {grad[place]}"
            assert abs(slope - float(grad[place])) <= bound, f"{name}: {slope}, gradient {grad[place]}, bound {bound}"


def ops_rank(port: int) -> None:
    group = part_of_job(port, int(os.environ["COMMLIB_RANK"]), 4)
    layers: Sequence[Layer] = [layer_of(name) for name in ("masked", "empty_rank", "uneven", "all_masked")]
    with open_for(layers[0], group) as runtime:
        for layer in layers:
            for plan in PLANS:
                check_layer(runtime, layer, plan)
        check_mixed_freezing(runtime, layers[0])
        check_rank_without_rows(runtime)
        check_misuse(runtime)
        check_finite_differences(runtime, group, layer_of("uniform", 6))
        check_leaks(runtime, layers[1])
    group.close()


def test_gradients_freezing_and_leaks() -> None:
    check_ranks(f"{HERE}:ops_rank", 4, args=free_ports(1), timeout_s=150)
