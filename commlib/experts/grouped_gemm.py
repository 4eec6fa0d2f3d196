"""Grouped matrix products of FP8 operands. Rows of expert e are those before `ends[e]`; rows after the last are not
touched.

CUDA tensors go to FP8 tensor cores where Triton is installed (`commlib.cuda.fp8_gemm`). Otherwise torch's grouped GEMM
takes what the operands stand for: with scales that are powers of two BF16 holds every `q * s` exactly, so this is the
sum that an FP8 GEMM forms which adds up in FP32, at the speed of BF16.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from commlib.experts.casts import casts_for
from commlib.quant import Fp8Rows, dequantize_columns, dequantize_weight

__all__ = ["Fp8Weight", "grouped_mm", "grouped_weight_grad", "quantize_experts"]


class Fp8Weight(NamedTuple):
    """float8_e4m3fn [E, N, K] and FP32 [E, N / 128, K / 128]."""

    values: Tensor
    scales: Tensor


def quantize_experts(weight: Tensor) -> Fp8Weight:
    """BF16 or FP32 [E, N, K], N and K multiples of 128, in 128x128 tiles. For the gradient of a product's input:
    `quantize_experts(weight.mT)`."""
    return Fp8Weight(*casts_for(weight).quantize_weight(weight.detach(), pow2=True))


def grouped_mm(x: Fp8Rows, weight: Fp8Weight, ends: Tensor, add_to: Tensor | None = None) -> Tensor:
    """`y[r] = x[r] W[e]^T`: [T, K], [E, N, K] -> [T, N] in the dtype of `x`; T and N multiples of 128.

    With `add_to`, such a result, the product is added to it, and `add_to` is returned. The kernel adds before it
    rounds, the other way rounds the product first.
    """
    if kernels := _kernels(x.fp8.device.type):
        y: Tensor = kernels.grouped_mm(x.fp8, x.scales, *weight, ends, x.dtype, add_to)
        return y
    product = F.grouped_mm(x.dequantize(), dequantize_weight(*weight, x.dtype).mT, offs=ends)
    return product if add_to is None else add_to.add_(product)


def grouped_weight_grad(grad: Fp8Rows, x: Fp8Rows, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """`sum over the rows r of e: grad[r]^T x[r]`: [T, N], [T, K] -> [E, N, K] of `dtype`; T a multiple of 128.

    Both operands are brought to 128x1 tiles first: the sum runs over rows.
    """
    if kernels := _kernels(x.fp8.device.type):
        grads: Tensor = kernels.grouped_weight_grad(*_by_columns(grad, True), *_by_columns(x, True), ends, dtype)
        return grads
    grad_columns, x_columns = (dequantize_columns(*_by_columns(rows, False), rows.dtype) for rows in (grad, x))
    return F.grouped_mm(grad_columns.t(), x_columns, offs=ends).to(dtype)


def _by_columns(rows: Fp8Rows, turned: bool) -> tuple[Tensor, Tensor]:
    q, scales = casts_for(rows).retile_columns(rows.fp8, rows.scales, turned=turned)
    return q, scales


@cache
def _kernels(device_type: str) -> Any:
    """A module with these functions for tensors of that kind, or None."""
    if device_type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from commlib.cuda import fp8_gemm

    return fp8_gemm
