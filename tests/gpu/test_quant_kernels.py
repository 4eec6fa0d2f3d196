"""The kernels of casts against torch on the CPU, which is what `commlib.quant` is tested as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_clock import microseconds
from quant_checks import check_e5m6, close_rows, close_sums, make, same, same_rows

from commlib import quant
from commlib.errors import ConfigError
from commlib.quant import Fp8Rows

pytestmark = pytest.mark.gpu

ROWS = [0, 1, 37, 128, 4099]


def kernels() -> Any:
    from commlib.cuda import quant as fused

    return fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [128, 384, 7168])
def test_rows(dtype: torch.dtype, columns: int) -> None:
    for rows in ROWS:
        x = make(rows, columns, dtype, rows, is_odd=True)
        for num_sms in (None, 3):
            same_rows(kernels().cast_rows(x.cuda(), num_sms=num_sms), quant.cast_rows(x), f"{rows} rows")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256), (2, 130, 200), (1, 8, 8), (0, 128, 128)])
def test_weights(dtype: torch.dtype, pow2: bool, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    if w.numel() > 1000:
        w.view(-1)[11], w.view(-1)[700] = float("nan"), 300.0
    for ours, theirs in zip(
        kernels().quantize_weight(w.cuda(), pow2=pow2), quant.quantize_weight(w, pow2=pow2), strict=True
    ):
        same(ours, theirs, str(shape))
    if shape[-2] % 8 == 0:
        turned = kernels().quantize_weight(w.cuda().mT, pow2=pow2)
        for ours, theirs in zip(turned, quant.quantize_weight(w.mT, pow2=pow2), strict=True):
            same(ours, theirs, f"{shape}, rows and columns exchanged")


@pytest.mark.parametrize("pow2", [False, True])
def test_columns(pow2: bool) -> None:
    for rows, hidden in ((0, 256), (128, 128), (1280, 7168)):
        given = quant.quantize_e4m3(make(rows, hidden, torch.bfloat16, rows), pow2=True)
        for turned in (False, True):
            ours = kernels().retile_columns(*(each.cuda() for each in given), pow2=pow2, turned=turned)
            for mine, theirs in zip(ours, quant.retile_columns(*given, pow2=pow2, turned=turned), strict=True):
                same(mine, theirs, f"{rows} x {hidden}, {turned=}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype) -> None:
    for rows in ROWS:
        for width in (128, 384, 2048):
            generator = torch.Generator().manual_seed(rows + width)
            gate, up, grad = (torch.randn(rows, width, generator=generator).mul(3).to(dtype) for _ in range(3))
            weights = torch.rand(rows, generator=generator)
            what = f"{rows} x {width}, {dtype}"
            ours, theirs = kernels().swiglu_cast(gate.cuda(), up.cuda(), weights.cuda()), None
            theirs = quant.swiglu_cast(gate, up, weights)
            same_rows(ours.gate, theirs.gate, f"{what}: gate")
            same_rows(ours.up, theirs.up, f"{what}: up")
            close_rows(ours.inner, theirs.inner, f"{what}: inner")
            again = kernels().swiglu_again(ours.gate, ours.up, weights.cuda())
            close_rows(again, quant.swiglu_again(theirs.gate, theirs.up, weights), f"{what}: again")
            back = kernels().swiglu_backward(grad.cuda(), ours.gate, ours.up, weights.cuda())
            expected = quant.swiglu_backward(grad, theirs.gate, theirs.up, weights)
            close_rows(back.gate, expected.gate, f"{what}: gradient of gate")
            close_rows(back.up, expected.up, f"{what}: gradient of up")
            inputs = theirs.gate.dequantize().double() * theirs.up.dequantize().double()
            close_sums(back.row_weights, expected.row_weights, grad.double() * inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_e5m6(dtype: torch.dtype) -> None:
    check_e5m6(kernels(), dtype, "cuda", ((0, 128), (1, 128), (40, 384), (4099, 7168)))


def test_experts_choose_the_kernels_and_compute_the_same() -> None:
    from commlib.experts import SwiGLUWeights, fp8_swiglu

    results = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(1)
        weights = SwiGLUWeights(
            *(
                (torch.randn(shape, generator=generator) / 16).to(device).requires_grad_()
                for shape in ((2, 256, 256), (2, 256, 256), (2, 256, 256))
            )
        )
        x = quant.cast_rows(torch.randn(384, 256, generator=generator).bfloat16())
        x = Fp8Rows(x.fp8.to(device), x.scales.to(device), x.dtype)
        row_weights = torch.rand(384, generator=generator).to(device).requires_grad_()
        y = fp8_swiglu(x, row_weights, weights, torch.tensor([128, 384], dtype=torch.int32, device=device))
        y.backward(torch.randn(384, 256, generator=generator).bfloat16().to(device))
        results.append([y, row_weights.grad, *(each.grad for each in weights)])
    for theirs, ours in zip(*results, strict=True):
        assert ours is not None and theirs is not None
        error = float((ours.cpu().double() - theirs.double()).norm() / theirs.double().norm())
        assert error < 2.0**-6, error  # BF16 sums in another order; a wrong scale would give 0.5


def test_work_in_graphs() -> None:
    x = make(256, 512, torch.bfloat16, 1).cuda()
    kernels().cast_rows(x)  # loads them
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernels().cast_rows(x)
    other = make(256, 512, torch.bfloat16, 2)
    x.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    same_rows(got, quant.cast_rows(other), "replayed")


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(4, 100, device="cuda")
    wrong: list[Callable[[], Any]] = [
        lambda: kernels().cast_rows(x),
        lambda: kernels().cast_rows(x[:, :64].half()),
        lambda: kernels().quantize_weight(x),
        lambda: kernels().swiglu_cast(x.new_zeros(4, 128), x.new_zeros(5, 128), x.new_ones(4)),
        lambda: kernels().swiglu_cast(x.new_zeros(4, 128), x.new_zeros(4, 128), torch.ones(4)),
    ]
    for call in wrong:
        with pytest.raises(ConfigError):
            call()


def test_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what part of a copy of the same bytes each kernel reaches; below a tenth something is badly wrong."""
    fused, rows, width = kernels(), 32768, 2048
    gate, up, grad = (torch.randn(rows, width, device="cuda").bfloat16() for _ in range(3))
    weights = torch.rand(rows, device="cuda")
    kept = fused.swiglu_cast(gate, up, weights)
    w = torch.randn(8, 2048, 7168, device="cuda")
    cases: dict[str, tuple[Callable[[], Any], int]] = {
        "cast_rows": (lambda: fused.cast_rows(gate), 3 * gate.numel()),
        "swiglu_cast": (lambda: fused.swiglu_cast(gate, up, weights), 7 * gate.numel()),
        "swiglu_again": (lambda: fused.swiglu_again(kept.gate, kept.up, weights), 3 * gate.numel()),
        "swiglu_backward": (lambda: fused.swiglu_backward(grad, kept.gate, kept.up, weights), 6 * gate.numel()),
        "retile_columns": (lambda: fused.retile_columns(kept.gate.fp8, kept.gate.scales), 2 * gate.numel()),
        "... turned": (lambda: fused.retile_columns(kept.gate.fp8, kept.gate.scales, turned=True), 2 * gate.numel()),
        "quantize_weight": (lambda: fused.quantize_weight(w, pow2=True), 5 * w.numel()),
        "... of w.mT": (lambda: fused.quantize_weight(w.mT, pow2=True), 5 * w.numel()),
    }
    for name, (call, num_bytes) in cases.items():
        source = torch.empty(num_bytes // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        ours, copy = microseconds(call), microseconds(lambda s=source, t=target: t.copy_(s))
        with capsys.disabled():
            print(f"{name:<16} {ours:8.1f} us  {num_bytes / ours / 1e3:7.1f} GB/s  {copy / ours:5.2f} of a copy")
        assert copy > 0.1 * ours, name
