"""E5M6: 12 bits with one power of two per token and 128 columns, for activations that FP8 would spoil.

The format of the inputs of the linear layer after attention in the DeepSeek-V3 technical report (arXiv 2412.19437,
section 3.3.3), which gives the bits, not their layout: sign, 5 bits of exponent with bias 15, 6 of mantissa; numbers
below 2^-14 are multiples of 2^-20; the last exponent is that of NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from commlib.errors import ConfigError
from commlib.layout import SCALE_BLOCK, num_scales
from commlib.quant.e4m3 import largest_magnitude, scales_of

__all__ = ["E5M6_MAX", "dequantize_e5m6", "quantize_e5m6"]

E5M6_MAX = 65024.0  # (2 - 2^-6) * 2^15

_LAST = (30 << 6) + 63  # the code of E5M6_MAX
_NAN = (31 << 6) + 32


def quantize_e5m6(x: Tensor) -> tuple[Tensor, Tensor]:
    """Casts rows to 12 bits.

    Per block of 128 columns: `s = 2 ** ceil(log2(max(|x|, 1e-4) / 65024))`, `q = e5m6(x / s)`, rounded to nearest even.
    A NaN stays NaN and leaves its neighbours alone; an infinity makes its block NaN (0 times an infinite scale).

    Error: at most `2^-7 |x| + 2^-21 s`: half a unit of 6 bits of mantissa, or of 2^-20 where they run out; `x / s` is
    exact, or far below the smallest number.

    Args:
        x: BF16 or FP32 [T, H], H a multiple of 128.

    Returns:
        (uint8 [T, H * 3 / 2], FP32 scales [T, H / 128]): two numbers in three bytes, the first in the low 12 bits.

    Raises:
        ConfigError: another dtype or shape.
    """
    if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(f"x is {x.dtype} {list(x.shape)}, the rule: bfloat16 or float32 [tokens, hidden]")
    num_tokens, hidden = x.shape
    blocks = x.float().reshape(num_tokens, num_scales(hidden), SCALE_BLOCK)
    scales = scales_of(largest_magnitude(blocks, (2,)), E5M6_MAX, pow2=True)
    codes = _encode((blocks / scales.unsqueeze(2)).reshape(num_tokens, hidden // 2, 2))
    low, high = codes.unbind(2)
    packed = torch.stack((low & 0xFF, low >> 8 | (high & 0xF) << 4, high >> 4), dim=2)
    return packed.to(torch.uint8).reshape(num_tokens, hidden // 2 * 3), scales


def dequantize_e5m6(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`q * s` in FP32, rounded to `dtype`; what `quantize_e5m6` gives, back.

    Args:
        packed: uint8 [T, H * 3 / 2].
        scales: FP32 [T, H / 128].
        dtype: of the result.

    Returns:
        [T, H] of `dtype`.

    Raises:
        ConfigError: the shapes do not fit.
    """
    num_tokens, blocks = scales.shape
    hidden = blocks * SCALE_BLOCK
    if tuple(packed.shape) != (num_tokens, hidden // 2 * 3):
        raise ConfigError(f"packed has shape {list(packed.shape)}, the rule: [{num_tokens}, {hidden // 2 * 3}]")
    first, middle, last = packed.int().reshape(num_tokens, hidden // 2, 3).unbind(2)
    codes = torch.stack((first | (middle & 0xF) << 8, middle >> 4 | last << 4), dim=2)
    values = _decode(codes).reshape(num_tokens, blocks, SCALE_BLOCK)
    return (values * scales.unsqueeze(2)).reshape(num_tokens, hidden).to(dtype)


def _power_of_two(exponent: Tensor) -> Tensor:
    """FP32, of int32 exponents in -126..127."""
    return (exponent + 127 << 23).view(torch.float32)


def _encode(values: Tensor) -> Tensor:
    """int32 codes of FP32 values."""
    bits = values.view(torch.int32)
    magnitude = (bits & 0x7FFFFFFF).view(torch.float32)
    exponent = ((bits >> 23 & 0xFF) - 127).clamp(-14, 16)
    # In units of the last place: 64..128, less where there is no hidden one. 128 carries into the exponent by itself.
    units = torch.round(magnitude / _power_of_two(exponent - 6)).clamp(max=128).nan_to_num(0).int()
    codes = ((exponent + 15 << 6) + units - 64).clamp(max=_LAST)
    codes = torch.where(torch.isnan(values), _NAN, codes)
    return codes | (bits >> 31 & 1) << 11


def _decode(codes: Tensor) -> Tensor:
    exponent, mantissa = codes >> 6 & 0x1F, codes & 0x3F
    units = torch.where(exponent == 0, mantissa, mantissa + 64).float()
    values = units * _power_of_two(exponent.clamp(min=1) - 21)
    values = torch.where(exponent == 31, torch.nan, values)
    return torch.where(codes >> 11 == 1, -values, values)
