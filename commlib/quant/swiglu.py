"""SwiGLU with a weight per row, between casts to FP8: what experts keep and compute again.

`y = (silu(gate) * up) * w`, `silu(x) = x / (1 + exp(-x))`, all in FP32; every result is cast like `quantize_e4m3` with
scales that are powers of two. DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.3: the inputs of SwiGLU are
kept in FP8, its output is computed again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from commlib.quant.e4m3 import quantize_e4m3
from commlib.quant.rows import Fp8Rows

__all__ = ["SwiGLUGrads", "SwiGLURows", "cast_rows", "swiglu_again", "swiglu_backward", "swiglu_cast"]


class SwiGLURows(NamedTuple):
    """What comes of SwiGLU, and its inputs as they are kept."""

    inner: Fp8Rows
    gate: Fp8Rows
    up: Fp8Rows


class SwiGLUGrads(NamedTuple):
    """Gradients of the inputs; of the rows' weights FP32 [T]."""

    gate: Fp8Rows
    up: Fp8Rows
    row_weights: Tensor


def cast_rows(x: Tensor) -> Fp8Rows:
    """BF16 or FP32 [T, H] with scales that are powers of two.

    Raises:
        ConfigError: another dtype or shape.
    """
    return Fp8Rows(*quantize_e4m3(x, pow2=True), x.dtype)


def swiglu_cast(gate: Tensor, up: Tensor, row_weights: Tensor) -> SwiGLURows:
    """Forward: of gate and up BF16 or FP32 [T, W], row_weights FP32 [T].

    Raises:
        ConfigError: W is no multiple of 128.
    """
    inner = _swiglu(gate.float(), up.float()) * row_weights[:, None]
    return SwiGLURows(_cast(inner, gate.dtype), cast_rows(gate), cast_rows(up))


def swiglu_again(gate: Fp8Rows, up: Fp8Rows, row_weights: Tensor) -> Fp8Rows:
    """What `swiglu_cast` gives for kept inputs."""
    inner = _swiglu(gate.dequantize().float(), up.dequantize().float()) * row_weights[:, None]
    return _cast(inner, gate.dtype)


def swiglu_backward(grad: Tensor, gate: Fp8Rows, up: Fp8Rows, row_weights: Tensor) -> SwiGLUGrads:
    """Gradients of kept inputs and of the rows' weights from that of the result, BF16 or FP32 [T, W]."""
    grad, gate_out, up_out = grad.float(), gate.dequantize().float(), up.dequantize().float()
    weighted, sigmoid = grad * row_weights[:, None], gate_out.sigmoid()
    grad_gate = weighted * up_out * sigmoid * (1 + gate_out * (1 - sigmoid))
    grad_up = weighted * gate_out * sigmoid
    grad_row_weights = (grad * _swiglu(gate_out, up_out)).sum(dim=1)
    return SwiGLUGrads(_cast(grad_gate, gate.dtype), _cast(grad_up, gate.dtype), grad_row_weights)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _cast(x: Tensor, dtype: torch.dtype) -> Fp8Rows:
    return Fp8Rows(*quantize_e4m3(x, pow2=True), dtype)
