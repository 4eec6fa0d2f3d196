"""FP8 E4M3 with one FP32 scale per token and 128 columns (1x128).

Formulas: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.2 "fine-grained quantization", and
`act_quant` of its published inference code, which adds the floor of 1e-4 under the maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from commlib.errors import ConfigError
from commlib.layout import SCALE_BLOCK, num_scales

__all__ = ["E4M3_MAX", "MIN_AMAX", "dequantize", "largest_magnitude", "next_power_of_two", "quantize_e4m3", "scales_of"]

E4M3_MAX = 448.0
# Keeps a block of zeros from dividing by zero.
MIN_AMAX = 1e-4

_EXPONENT_BITS = 0x7F800000
_MANTISSA_BITS = 0x007FFFFF
_ONE_EXPONENT = 0x00800000


def next_power_of_two(scales: Tensor) -> Tensor:
    """`2 ** ceil(log2(scales))` for positive normal FP32, exactly: log2f would err next to powers of two.

    Infinity has no mantissa bits and stays. Scales are no NaN, and none is large enough to be rounded up to infinity.
    """
    bits = scales.view(torch.int32)
    rounded = (bits & _EXPONENT_BITS) + (bits & _MANTISSA_BITS).ne(0).int() * _ONE_EXPONENT
    return rounded.view(torch.float32)


def largest_magnitude(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Of FP32 values over some dimensions, without NaNs, at least `MIN_AMAX`."""
    return torch.where(torch.isnan(x), 0.0, x.abs()).amax(dim=dims).clamp_min(MIN_AMAX)


def scales_of(amax: Tensor, largest: float, *, pow2: bool) -> Tensor:
    """Scales that bring `amax` to the largest number of a format, or, as powers of two, at most there."""
    # A tensor as divisor: torch may turn a division by a number into a multiplication by its rounded inverse.
    scales = amax / torch.full_like(amax, largest)
    return next_power_of_two(scales) if pow2 else scales


def quantize_e4m3(x: Tensor, *, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """Casts rows to FP8.

    Per block of 128 columns: `amax = max(|x|, 1e-4)`, `s = amax / 448` (FP32 division; with `pow2`:
    `2 ** ceil(log2(amax / 448))`), `q = e4m3(x / s)` (FP32 division, round to nearest even, saturating at 448).
    A NaN stays NaN and does not enter `amax`, so its neighbours keep their values. An infinity makes its scale
    infinite and itself NaN; the block dequantizes to NaN.

    Args:
        x: BF16 or FP32 [T, H], H a multiple of 128.
        pow2: whether scales are powers of two.

    Returns:
        (float8_e4m3fn [T, H], FP32 scales [T, H / 128]): `x ~ q * s`.

    Raises:
        ConfigError: another dtype or shape.
    """
    if x.ndim != 2 or x.dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(f"x is {x.dtype} {list(x.shape)}, the rule: bfloat16 or float32 [tokens, hidden]")
    num_tokens, hidden = x.shape
    blocks = x.float().reshape(num_tokens, num_scales(hidden), SCALE_BLOCK)
    scales = scales_of(largest_magnitude(blocks, (2,)), E4M3_MAX, pow2=pow2)
    # At most 448 * (1 + 2^-23), where the scale was rounded down; that rounds to 448, so the cast needs no clamp.
    quotients = blocks / scales.unsqueeze(2)
    return quotients.reshape(num_tokens, hidden).to(torch.float8_e4m3fn), scales


def dequantize(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`q * s` in FP32, rounded to `dtype`.

    Args:
        q: float8_e4m3fn [T, H].
        scales: FP32 [T, H / 128].
        dtype: of the result.

    Returns:
        [T, H] of `dtype`.

    Raises:
        ConfigError: the shapes do not fit.
    """
    num_tokens, hidden = q.shape
    if tuple(scales.shape) != (num_tokens, num_scales(hidden)):
        raise ConfigError(f"scales has shape {list(scales.shape)}, the rule: [{num_tokens}, {num_scales(hidden)}]")
    blocks = q.float().reshape(num_tokens, num_scales(hidden), SCALE_BLOCK) * scales.unsqueeze(2)
    return blocks.reshape(num_tokens, hidden).to(dtype)
