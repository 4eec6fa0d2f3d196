"""`experts.fp8_swiglu`: the numbers, and what it keeps for the backward pass."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from commlib.errors import ConfigError
from commlib.experts import SwiGLUWeights, fp8_swiglu, keep_weight_casts, weight_casts
from commlib.experts.grouped_gemm import Fp8Weight, quantize_experts
from commlib.overlap import WeightGradStore
from commlib.quant import Fp8Rows, dequantize, dequantize_columns, quantize_e4m3, quantize_weight, retile_columns
from commlib.quant.tiles import dequantize_weight

HIDDEN, WIDTH = 256, 128
COUNTS = (128, 0, 256)  # rows of each expert


def whole(shape: tuple[int, ...], largest: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers: their products add up without rounding, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)


def make_weights(scale: float = 2.0**-6) -> SwiGLUWeights:
    experts = len(COUNTS)
    shapes = ((experts, WIDTH, HIDDEN), (experts, WIDTH, HIDDEN), (experts, HIDDEN, WIDTH))
    made = [(whole(shape, 3, seed) * scale).requires_grad_() for seed, shape in enumerate(shapes)]
    return SwiGLUWeights(*made)


def make_rows(dtype: torch.dtype) -> Fp8Rows:
    return Fp8Rows(*quantize_e4m3(whole((sum(COUNTS), HIDDEN), 4, 7, dtype), pow2=True), dtype)


def ends() -> Tensor:
    return torch.tensor(COUNTS).cumsum(0).int()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return dequantize(*quantize_e4m3(x, pow2=True), dtype).double()


def by_columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a weight gradient sees of an operand."""
    return dequantize_columns(*retile_columns(*quantize_e4m3(x, pow2=True), pow2=True), dtype).double()


def cast_weight(w: Tensor) -> Tensor:
    return dequantize_weight(*quantize_weight(w.detach(), pow2=True), torch.float32).double()


def expected(
    x: Tensor, row_weights: Tensor, weights: SwiGLUWeights, grad: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Expert by expert in FP64, rounded where the FP8 recipe rounds."""
    found: dict[str, list[Tensor]] = {}
    for expert, (x_e, w_e, grad_e) in enumerate(
        zip(*(each.split(COUNTS) for each in (x, row_weights, grad)), strict=True)
    ):
        gate_w, up_w, down_w = (cast_weight(each[expert]) for each in weights)
        rows = x_e.double()
        gate, up = ((rows @ w.t()).to(dtype) for w in (gate_w, up_w))
        inner = cast(F.silu(gate.float()) * up.float() * w_e[:, None], dtype)
        kept_gate, kept_up = (cast(each, dtype).float() for each in (gate, up))
        grad_y = cast(grad_e, dtype)
        grad_inner = (grad_y @ down_w).to(dtype).float()
        sigmoid = kept_gate.sigmoid()
        again = F.silu(kept_gate) * kept_up
        grad_act = grad_inner * w_e[:, None]
        grad_gate = grad_act * kept_up * sigmoid * (1 + kept_gate * (1 - sigmoid))
        grad_up = grad_act * kept_gate * sigmoid
        parts = {
            "y": inner @ down_w.t(),
            "x": cast(grad_gate, dtype) @ gate_w + cast(grad_up, dtype) @ up_w,
            "row_weights": (grad_inner * again).sum(dim=1),
            "gate": by_columns(grad_gate, dtype).t() @ by_columns(x_e, dtype)
            if len(x_e)
            else torch.zeros(WIDTH, HIDDEN),
            "up": by_columns(grad_up, dtype).t() @ by_columns(x_e, dtype) if len(x_e) else torch.zeros(WIDTH, HIDDEN),
            "down": by_columns(grad_e.float(), dtype).t() @ by_columns(again * w_e[:, None], dtype)
            if len(x_e)
            else torch.zeros(HIDDEN, WIDTH),
        }
        for name, part in parts.items():
            found.setdefault(name, []).append(part)
    stacked = ("gate", "up", "down")
    return {name: torch.stack(each) if name in stacked else torch.cat(each) for name, each in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_the_fp8_recipe(dtype: torch.dtype) -> None:
    weights, source = make_weights(), make_rows(dtype)
    row_weights = (whole((sum(COUNTS),), 4, 11) / 4).requires_grad_()
    x = source.dequantize().requires_grad_()
    grad = whole((sum(COUNTS), HIDDEN), 2, 13, dtype)
    y = fp8_swiglu(x, row_weights, weights, ends())
    y.backward(grad)
    assert y.dtype == dtype
    want = expected(x.detach(), row_weights.detach(), weights, grad, dtype)
    got = {"y": y, "x": x.grad, "row_weights": row_weights.grad}
    got |= {name: each.grad for name, each in weights._asdict().items()}
    for name, mine in got.items():
        assert mine is not None, name
        # Sums of at most max(rows, width) FP32 terms, rounded to their dtype; x is the sum of two such.
        unit = 2.0**-8 if dtype == torch.bfloat16 and name != "row_weights" else 2.0**-23
        bound = float(want[name].abs().max()) * (2 * unit + 2.0**-23 * max(COUNTS) ** 0.5)
        torch.testing.assert_close(
            mine.double(), want[name].double(), rtol=0, atol=bound, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_fp8_gradients_count_as_they_are() -> None:
    """The same gradient in FP8 rows and as plain rows: the same bits, because its cast is exact."""
    results = []
    for is_fp8 in (False, True):
        weights, x, row_weights = make_weights(), make_rows(torch.bfloat16), torch.ones(sum(COUNTS), requires_grad=True)
        y = fp8_swiglu(x, row_weights, weights, ends())
        grad = Fp8Rows(*quantize_e4m3(whole(tuple(y.shape), 2, 13, torch.bfloat16), pow2=True), torch.bfloat16)
        torch.autograd.backward([y], [grad if is_fp8 else grad.dequantize()])
        results.append([row_weights.grad, *(each.grad for each in weights)])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


@contextmanager
def keeping() -> Iterator[list[Tensor]]:
    """What autograd is asked to keep inside."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        yield kept


def test_keeps_fp8_only_and_no_second_copy_of_the_rows() -> None:
    x, weights = make_rows(torch.bfloat16), make_weights()
    row_weights = torch.ones(sum(COUNTS), requires_grad=True)
    with keeping() as kept:
        fp8_swiglu(x, row_weights, weights, ends())
    rows = [each for each in kept if each.ndim == 2 and each.shape[0] == sum(COUNTS)]
    assert {each.data_ptr() for each in rows} >= {x.fp8.data_ptr(), x.scales.data_ptr()}
    large = [each for each in rows if each.shape[1] >= min(HIDDEN, WIDTH)]
    assert len(large) == 3 and {each.dtype for each in large} == {torch.float8_e4m3fn}
    # The check finds what it looks for: rows in BF16 are copied when they are cast, plain experts keep BF16.
    with keeping() as kept:
        fp8_swiglu(x.dequantize(), row_weights, weights, ends())
    assert x.fp8.data_ptr() not in {each.data_ptr() for each in kept}


@pytest.mark.parametrize("frozen", [None, "up", "all"])
def test_weight_gradients_may_wait(frozen: str | None) -> None:
    at_once, later = make_weights(), make_weights()
    for weights in (at_once, later):
        for name, each in weights._asdict().items():
            each.requires_grad_(frozen != "all" and name != frozen)
    row_weights, grad = torch.ones(sum(COUNTS)), whole((sum(COUNTS), HIDDEN), 2, 13, torch.bfloat16)
    fp8_swiglu(make_rows(torch.bfloat16), row_weights, at_once, ends()).backward(grad)
    store = WeightGradStore()
    with store.recording():
        y = fp8_swiglu(make_rows(torch.bfloat16), row_weights, later, ends())
    y.backward(grad)
    assert all(each.grad is None for each in later)
    for work in store.take():
        work()
    for name, ours, theirs in zip(later._fields, later, at_once, strict=True):
        if frozen in ("all", name):
            assert ours.grad is None and theirs.grad is None
        else:
            assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad), name


@pytest.mark.parametrize("is_keeping", [False, True])
def test_compiles(is_keeping: bool) -> None:
    results = []
    for is_compiled in (False, True):
        weights, row_weights = make_weights(), torch.ones(sum(COUNTS), requires_grad=True)

        def layer(x: Tensor, row_weights: Tensor, *weights: Tensor) -> Tensor:
            return F.silu(fp8_swiglu(x, row_weights, SwiGLUWeights(*weights), ends()))

        call = torch.compile(layer, backend="aot_eager") if is_compiled else layer
        outs = []
        for _ in range(2):  # the second time with other weights: a graph must not have kept the first ones' casts
            with keep_weight_casts() if is_keeping else nullcontext():
                outs.append(call(make_rows(torch.bfloat16), row_weights, *weights))
                outs[-1].float().sum().backward()
            with torch.no_grad():
                for each in weights:
                    each.mul_(-2)
        results.append([*outs, row_weights.grad, *(each.grad for each in weights)])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_casts_are_kept_for_a_step(is_checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []

    def counted(weight: Tensor) -> Fp8Weight:
        made.append(weight)
        return quantize_experts(weight)

    monkeypatch.setattr(weight_casts, "quantize_experts", counted)
    results = []
    for is_keeping in (False, True):
        weights, row_weights, found = make_weights(), torch.ones(sum(COUNTS)), []

        def layer(weights: SwiGLUWeights = weights, row_weights: Tensor = row_weights) -> Tensor:
            return fp8_swiglu(make_rows(torch.bfloat16), row_weights, weights, ends())

        for change in ("nothing", ".data"):
            if change == ".data":
                weights.up.data.mul_(2)  # torch does not see this, but a step has ended
            made.clear()
            with keep_weight_casts() if is_keeping else nullcontext():
                for _ in range(2):  # micro-batches
                    y = checkpoint(layer, use_reentrant=False) if is_checkpointed else layer()
                    y.float().square().sum().backward()
                    found.append(y.detach())
                assert len(made) == (6 if is_keeping else 18 if is_checkpointed else 12), change
                with torch.no_grad():
                    weights.gate.mul_(2)  # torch sees this, even before the step ends
                found.append(layer().detach())
                assert made[-3 if not is_keeping else -1] is weights.gate
        results.append([*found, *(each.grad for each in weights)])
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)
    with keep_weight_casts(), pytest.raises(ConfigError, match="active already"), keep_weight_casts():
        pass


def test_gradients_of_weights_come_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of each is free when the next is computed, but for the gradients that the weights keep."""
    module = sys.modules["commlib.experts.fp8_swiglu"]
    compute, made, wanted = module.grouped_weight_grad, [], []  # type: ignore[attr-defined]

    def watched(*arguments: Any) -> Tensor:
        assert not any(each() is not None for each in made)
        grad: Tensor = compute(*arguments)
        made.append(weakref.ref(grad))
        return grad

    weights = make_weights()
    for _ in range(2):
        fp8_swiglu(make_rows(torch.bfloat16), torch.ones(sum(COUNTS)), weights, ends()).sum().backward()
        wanted.append([each.grad.clone() for each in weights if each.grad is not None])
        monkeypatch.setattr(module, "grouped_weight_grad", watched)  # from the second time on, when gradients are there
    assert len(made) == 3
    for once, twice in zip(*wanted, strict=True):
        assert torch.equal(2 * once, twice)


@pytest.mark.parametrize("which", ["gate", "up", "down"])
def test_only_wanted_gradients_of_weights(which: str) -> None:
    whole_weights, weights = make_weights(), make_weights()
    for name, each in weights._asdict().items():
        each.requires_grad_(name == which)
    for each in (whole_weights, weights):
        fp8_swiglu(make_rows(torch.bfloat16), torch.ones(sum(COUNTS)), each, ends()).sum().backward()
    for name, each in weights._asdict().items():
        assert (each.grad is not None) == (name == which)
    assert torch.equal(getattr(weights, which).grad, getattr(whole_weights, which).grad)
    row_weights = torch.ones(sum(COUNTS), requires_grad=True)
    y = fp8_swiglu(make_rows(torch.bfloat16), row_weights, whole_weights, ends())
    (grad,) = torch.autograd.grad(y.sum(), [getattr(whole_weights, which)], retain_graph=True)
    assert torch.equal(grad, getattr(weights, which).grad)
    torch.autograd.grad(y.sum(), [row_weights], retain_graph=True)
    # What nobody has asked for does not wait, with its operands, for as long as the graph lives.
    assert y.grad_fn is not None and y.grad_fn.work == {}


def test_backward_passes_of_one_graph_at_the_same_time() -> None:
    weights = make_weights()
    y = fp8_swiglu(make_rows(torch.bfloat16), torch.ones(sum(COUNTS)), weights, ends())

    def grads(scale: float) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, weights, torch.full_like(y, scale), retain_graph=True)

    expected = {scale: grads(scale) for scale in (1.0, 2.0, 4.0, 8.0)}
    with ThreadPoolExecutor(len(expected)) as threads:
        asked = list(expected) * 10
        for scale, found in zip(asked, threads.map(grads, asked), strict=True):
            for ours, theirs in zip(found, expected[scale], strict=True):
                assert torch.equal(ours, theirs)


def test_no_rows_at_all() -> None:
    weights, row_weights = make_weights(), torch.ones(0, requires_grad=True)
    x = torch.zeros(0, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    y = fp8_swiglu(x, row_weights, weights, torch.zeros(len(COUNTS), dtype=torch.int32))
    y.sum().backward()
    assert y.shape == (0, HIDDEN) and x.grad is not None
    assert all(each.grad is not None and not each.grad.any() for each in weights)


def test_rows_come_in_tiles() -> None:
    x = torch.zeros(64, HIDDEN)
    with pytest.raises(ConfigError, match="num_rows=64 is no multiple of 128"):
        fp8_swiglu(x, torch.ones(64), make_weights(), ends())
