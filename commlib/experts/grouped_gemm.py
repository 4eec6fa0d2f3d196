"""Grouped matrix products of FP8 operands, by torch's grouped GEMM on what they stand for.

With scales that are powers of two BF16 holds every `q * s` exactly, so this is the sum that an FP8 GEMM forms which
adds up in FP32, at the speed of BF16. Rows of expert e are those before `ends[e]`; rows after the last are not touched.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from commlib.experts.casts import casts_for
from commlib.quant import Fp8Rows, dequantize_columns, dequantize_weight

__all__ = ["Fp8Weight", "grouped_mm", "grouped_mm_transposed", "grouped_weight_grad", "quantize_experts"]


class Fp8Weight(NamedTuple):
    """float8_e4m3fn [E, N, K] and FP32 [E, ceil(N / 128), ceil(K / 128)]."""

    values: Tensor
    scales: Tensor


def quantize_experts(weight: Tensor) -> Fp8Weight:
    """BF16 or FP32 [E, N, K] in 128x128 tiles."""
    return Fp8Weight(*casts_for(weight).quantize_weight(weight.detach(), pow2=True))


def grouped_mm(x: Fp8Rows, weight: Fp8Weight, ends: Tensor) -> Tensor:
    """`y[r] = x[r] W[e]^T`: [T, K], [E, N, K] -> [T, N] in the dtype of `x`."""
    return F.grouped_mm(x.dequantize(), dequantize_weight(*weight, x.dtype).transpose(1, 2), offs=ends)


def grouped_mm_transposed(grad: Fp8Rows, weight: Fp8Weight, ends: Tensor) -> Tensor:
    """`x[r] = grad[r] W[e]`: [T, N], [E, N, K] -> [T, K] in the dtype of `grad`."""
    return F.grouped_mm(grad.dequantize(), dequantize_weight(*weight, grad.dtype), offs=ends)


def grouped_weight_grad(grad: Fp8Rows, x: Fp8Rows, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """`sum over the rows r of e: grad[r]^T x[r]`: [T, N], [T, K] -> [E, N, K] of `dtype`; T a multiple of 128.

    Both operands are brought to 128x1 tiles first: the sum runs over rows.
    """
    return F.grouped_mm(_by_columns(grad).t(), _by_columns(x), offs=ends).to(dtype)


def _by_columns(rows: Fp8Rows) -> Tensor:
    q, scales = casts_for(rows).retile_columns(rows.fp8, rows.scales, pow2=True)
    return dequantize_columns(q, scales, rows.dtype)
