"""Inputs and comparisons for the kernels of casts, on GPUs and as they run on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from commlib import quant
from commlib.quant import Fp8Rows

__all__ = ["check_e5m6", "close_rows", "close_sums", "make", "same", "same_rows"]


def make(rows: int, columns: int, dtype: torch.dtype, seed: int, *, is_odd: bool = False) -> Tensor:
    """Rows of very different sizes; with `is_odd` also zeros, infinities, NaNs, and numbers that vanish."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.logspace(-6, 6, max(rows, 1))[:rows, None]
    if is_odd and rows >= 37:
        x[0], x[1, 5], x[2, 7], x[3, :128], x[4] = 0.0, float("nan"), float("inf"), 1e-30, -x[4].abs()
        x[5, 3] = float("-inf")
    return x.to(dtype)


def same(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Bits, a zero's sign among them; but any NaN is as good as another."""
    ours, theirs = ours.cpu(), theirs.cpu()
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
    a, b = ours.float(), theirs.float()
    are_same = (a == b) & (a.signbit() == b.signbit())
    assert bool((are_same | (a.isnan() & b.isnan())).all()), what


def same_rows(ours: Fp8Rows, theirs: Fp8Rows, what: str) -> None:
    assert ours.dtype == theirs.dtype, what
    same(ours.fp8, theirs.fp8, f"{what}: rows")
    same(ours.scales, theirs.scales, f"{what}: scales")


def close_rows(ours: Fp8Rows, theirs: Fp8Rows, what: str) -> None:
    """CUDA's exponential errs by 2 units, the CPU's by one or so: a few units before the cast may tip it to the
    neighbouring number, a factor of 1 +- 2^-3, or 2^-9 of the scale where numbers run out."""
    a, b = ours.fp8.cpu().double(), theirs.fp8.cpu().double()
    scale_a, scale_b = (each.scales.cpu().double().repeat_interleave(128, dim=1) for each in (ours, theirs))
    error, size = (a * scale_a - b * scale_b).abs(), (b * scale_b).abs()
    assert bool((error <= 2.0**-3 * size + 2.0**-8 * torch.maximum(scale_a, scale_b)).all()), what
    share = float((error > 0).double().mean()) if error.numel() else 0.0
    assert share < 0.01, f"{what}: {share:.2%} differ"


def close_sums(ours: Tensor, theirs: Tensor, terms: Tensor) -> None:
    """Sums over the last dimension of `terms`, in any order, of products of a few roundings each."""
    bound = (terms.shape[-1] + 16) * 2.0**-23 * terms.double().abs().sum(dim=-1)
    assert bool(((ours.cpu().double() - theirs.double()).abs() <= bound).all())


def check_e5m6(kernels: Any, dtype: torch.dtype, device: str, shapes: Iterable[tuple[int, int]]) -> None:
    """Both directions of `kernels` on a device against `commlib.quant`."""
    for rows, columns in shapes:
        x, what = make(rows, columns, dtype, rows), f"{rows} x {columns}"
        ours, theirs = kernels.quantize_e5m6(x.to(device)), quant.quantize_e5m6(x)
        same(ours[0], theirs[0], f"{what}: packed")
        same(ours[1], theirs[1], f"{what}: scales")
        same(kernels.dequantize_e5m6(*ours, dtype), quant.dequantize_e5m6(*theirs, dtype), f"{what}: back")
    low, high = torch.arange(4096).reshape(-1, 2).unbind(1)  # every number there is
    packed = torch.stack((low & 0xFF, low >> 8 | (high & 0xF) << 4, high >> 4), dim=1).to(torch.uint8).reshape(32, 192)
    scales = torch.ones(32, 1)
    back = kernels.dequantize_e5m6(packed.to(device), scales.to(device), dtype)
    same(back, quant.dequantize_e5m6(packed, scales, dtype), "every number")
    odd = make(40, 384, dtype, 2, is_odd=True)
    back = kernels.dequantize_e5m6(*kernels.quantize_e5m6(odd.to(device)), dtype)
    same(back, quant.dequantize_e5m6(*quant.quantize_e5m6(odd), dtype), "odd numbers")
