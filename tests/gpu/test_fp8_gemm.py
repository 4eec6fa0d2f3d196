"""Grouped FP8 products on tensor cores against FP64 products of what the operands stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_clock import microseconds
from torch import Tensor

from commlib import quant
from commlib.errors import ConfigError

pytestmark = pytest.mark.gpu

COUNTS = (128, 0, 384, 256)  # rows of each expert
SPARE = 256  # rows that belong to none
SHAPES = [(128, 128), (256, 384), (2048, 7168)]


def gemm() -> Any:
    from commlib.cuda import fp8_gemm

    return fp8_gemm


def operand(shape: tuple[int, ...], seed: int, *, is_exact: bool) -> Tensor:
    """Whole numbers up to 3, whose sums over 128 fit in the 14 bits that the tensor cores keep; or any numbers."""
    generator = torch.Generator().manual_seed(seed)
    if not is_exact:
        return torch.randn(shape, generator=generator)
    return torch.randint(-3, 4, shape, generator=generator).float()


def powers(shape: tuple[int, ...], blocks: tuple[int, ...], seed: int) -> Tensor:
    """1/2, 1 or 2 for each block of so many elements: scales differ, and sums of whole numbers fit in FP32."""
    counts = [-(-size // block) for size, block in zip(shape, blocks, strict=True)]
    found = 2.0 ** torch.randint(-1, 2, counts, generator=torch.Generator().manual_seed(seed))
    for dim, block in enumerate(blocks):
        found = found.repeat_interleave(block, dim)
    return found


def ends() -> Tensor:
    return torch.tensor(COUNTS).cumsum(0).int().cuda()


def by_expert(x: Tensor) -> tuple[Tensor, ...]:
    return x[: sum(COUNTS)].split(COUNTS)


def check(ours: Tensor, theirs: Tensor, is_exact: bool) -> None:
    """Exact sums are exact. Others: of each term 13 bits below the largest are kept, which for sums of random numbers
    is far below 2^-8 of their size; scales of other blocks would give a good part of it."""
    if is_exact:
        assert torch.equal(ours.double(), theirs)
    else:
        assert float((ours.double() - theirs).norm()) <= 2.0**-8 * float(theirs.norm())


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize(("width", "depth"), SHAPES)
def test_rows(width: int, depth: int, is_exact: bool) -> None:
    num_rows = sum(COUNTS) + SPARE
    x_shape, w_shape = (num_rows, depth), (len(COUNTS), width, depth)
    x = quant.cast_rows((operand(x_shape, 1, is_exact=is_exact) * powers(x_shape, (1, 128), 2)).cuda())
    w = operand(w_shape, 3, is_exact=is_exact) * powers(w_shape, (1, 128, 128), 4)
    values, scales = quant.quantize_weight(w.cuda(), pow2=True)
    y = gemm().grouped_mm(x.fp8, x.scales, values, scales, ends(), torch.float32)
    exact_w = quant.dequantize_weight(values, scales, torch.float32).double()
    for ours, rows, weight in zip(by_expert(y), by_expert(x.dequantize().double()), exact_w, strict=True):
        check(ours, rows @ weight.t(), is_exact)
    again = gemm().grouped_mm(x.fp8, x.scales, values, scales, ends(), torch.bfloat16)
    assert torch.equal(again[: sum(COUNTS)], y[: sum(COUNTS)].bfloat16())
    before = operand((num_rows, width), 5, is_exact=True).bfloat16().cuda()
    added = gemm().grouped_mm(x.fp8, x.scales, values, scales, ends(), torch.bfloat16, before.clone())
    assert torch.equal(added[: sum(COUNTS)], (before.float() + y)[: sum(COUNTS)].bfloat16())
    assert torch.equal(added[sum(COUNTS) :], before[sum(COUNTS) :])


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize(("width", "depth"), SHAPES)
def test_weight_gradients(width: int, depth: int, is_exact: bool) -> None:
    num_rows = sum(COUNTS) + SPARE
    operands = []
    for seed, columns in ((1, width), (2, depth)):
        shape = (num_rows, columns)
        rows = operand(shape, seed, is_exact=is_exact) * powers(shape, (128, 1), seed + 2)
        rows = quant.cast_rows(rows.cuda())
        operands.append(quant.retile_columns(rows.fp8, rows.scales, turned=True))
    grad, x = (quant.dequantize_columns(q.t(), scales, torch.float32).double() for q, scales in operands)
    found = gemm().grouped_weight_grad(*operands[0], *operands[1], ends(), torch.float32)
    for ours, grad_rows, rows in zip(found, by_expert(grad), by_expert(x), strict=True):
        check(ours, grad_rows.t() @ rows, is_exact)
    again = gemm().grouped_weight_grad(*operands[0], *operands[1], ends(), torch.bfloat16)
    assert torch.equal(again, found.bfloat16())


def test_rows_of_no_expert_are_not_written() -> None:
    x = quant.cast_rows(torch.ones(512, 128, device="cuda"))
    w = quant.quantize_weight(torch.ones(2, 128, 128, device="cuda"), pow2=True)
    kept = torch.full((512, 128), 7.0, device="cuda")  # freed, so that the result is likely to lie there
    address = kept.data_ptr()
    del kept
    y = gemm().grouped_mm(x.fp8, x.scales, *w, torch.tensor([128, 256], dtype=torch.int32).cuda(), torch.float32)
    assert y.data_ptr() == address
    assert bool((y[:256] == 128).all()) and bool((y[256:] == 7).all())


def test_nothing_to_do() -> None:
    none = torch.tensor([0, 0], dtype=torch.int32).cuda()
    x = quant.cast_rows(torch.ones(0, 256, device="cuda"))
    w = quant.quantize_weight(torch.ones(2, 128, 256, device="cuda"), pow2=True)
    assert gemm().grouped_mm(x.fp8, x.scales, *w, none, torch.bfloat16).shape == (0, 128)
    turned = quant.retile_columns(x.fp8, x.scales, turned=True)
    assert not gemm().grouped_weight_grad(*turned, *turned, none, torch.float32).any()


def test_what_does_not_fit_is_refused() -> None:
    x = quant.cast_rows(torch.ones(128, 256, device="cuda"))
    w, scales = quant.quantize_weight(torch.ones(2, 128, 256, device="cuda"), pow2=True)
    zeros = torch.zeros(128, 256, device="cuda")
    for add_to in (zeros, zeros[:, :128].bfloat16(), zeros[:, ::2]):
        with pytest.raises(ConfigError, match="add_to is"):
            gemm().grouped_mm(x.fp8, x.scales, w, scales, ends()[:2], torch.float32, add_to)
    one = torch.tensor([128], dtype=torch.int32).cuda()
    wrong: list[Callable[[], Any]] = [
        lambda: gemm().grouped_mm(x.fp8, x.scales, w, scales, one, torch.float32),
        lambda: gemm().grouped_mm(x.fp8[:, :128], x.scales[:, :1], w, scales, ends()[:2], torch.float32),
        lambda: gemm().grouped_mm(x.fp8[:100], x.scales[:100], w, scales, ends()[:2], torch.float32),
        lambda: gemm().grouped_weight_grad(x.fp8, x.scales, x.fp8, x.scales, one, torch.float32),
    ]
    for call in wrong:
        with pytest.raises(ConfigError):
            call()


def test_speed(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the rates for DeepSeek-V3's experts on 4 ranks beside torch's grouped BF16 product of the same rows, which
    wants operands in BF16; below half of that something is badly wrong."""
    experts, rows, width, depth = 64, 32768, 2048, 7168
    stops = torch.arange(1, experts + 1, dtype=torch.int32, device="cuda") * (rows // experts)
    x, grad = (quant.cast_rows(torch.randn(rows, columns, device="cuda").bfloat16()) for columns in (depth, width))
    w = torch.randn(experts, width, depth, device="cuda", dtype=torch.bfloat16)
    cast = quant.quantize_weight(w, pow2=True)
    turned = [quant.retile_columns(each.fp8, each.scales, turned=True) for each in (grad, x)]
    plain_x, plain_grad = x.dequantize(), grad.dequantize()
    cases: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "rows": (
            lambda: gemm().grouped_mm(x.fp8, x.scales, *cast, stops, torch.bfloat16),
            lambda: F.grouped_mm(plain_x, w.mT, offs=stops),
        ),
        "weight gradients": (
            lambda: gemm().grouped_weight_grad(*turned[0], *turned[1], stops, torch.bfloat16),
            lambda: F.grouped_mm(plain_grad.t(), plain_x, offs=stops),
        ),
    }
    operations = 2 * rows * width * depth
    for name, (ours, theirs) in cases.items():
        fp8_us, bf16_us = microseconds(ours), microseconds(theirs)
        with capsys.disabled():
            print(f"{name:<18} FP8 {operations / fp8_us / 1e6:6.0f}, BF16 {operations / bf16_us / 1e6:6.0f} TFLOP/s")
        assert fp8_us < 2 * bf16_us, name
