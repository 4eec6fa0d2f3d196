"""FP8 E4M3 with scales of other tiles than 1x128: 128x128 for weights, 128x1 for weight gradients.

DeepSeek-V3 technical report (arXiv 2412.19437), sections 3.3.2 and 3.3.3: weights are grouped by 128 input and 128
output channels; activations that were dispatched as 1x128 tiles are turned into 128x1 tiles in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from commlib.errors import ConfigError
from commlib.layout import SCALE_BLOCK
from commlib.quant.e4m3 import E4M3_MAX, dequantize, largest_magnitude, scales_of

__all__ = ["dequantize_columns", "dequantize_weight", "quantize_weight", "retile_columns"]


def quantize_weight(w: Tensor, *, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """Casts weights to FP8 with one scale per 128x128 tile, like `quantize_e4m3` per 1x128. Last tiles may be smaller.

    Error: at most `2^-4 |w| (1 + 2^-20) + 2^-10 s`: half a unit of 3 bits of mantissa, or of 2^-9 where they run out,
    and two roundings of FP32.

    Args:
        w: BF16 or FP32 [..., N, K].
        pow2: whether scales are powers of two.

    Returns:
        (float8_e4m3fn [..., N, K], FP32 scales [..., ceil(N / 128), ceil(K / 128)]): `w ~ q * s`.

    Raises:
        ConfigError: another dtype or shape.
    """
    if w.ndim < 2 or w.dtype not in (torch.bfloat16, torch.float32):
        raise ConfigError(f"w is {w.dtype} {list(w.shape)}, the rule: bfloat16 or float32 [..., rows, columns]")
    tiles = _tiles(w.float())
    scales = scales_of(largest_magnitude(tiles, (-3, -1)), E4M3_MAX, pow2=pow2)
    q = tiles / scales[..., :, None, :, None]
    rows, columns = w.shape[-2:]
    return q.flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns].to(torch.float8_e4m3fn), scales


def dequantize_weight(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`q * s` in FP32, rounded to `dtype`.

    Args:
        q: float8_e4m3fn [..., N, K].
        scales: FP32 [..., ceil(N / 128), ceil(K / 128)].
        dtype: of the result.

    Returns:
        [..., N, K] of `dtype`.

    Raises:
        ConfigError: the shapes do not fit.
    """
    rows, columns = q.shape[-2:]
    expected = (*q.shape[:-2], -(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK))
    if tuple(scales.shape) != expected:
        raise ConfigError(f"scales has shape {list(scales.shape)}, the rule: {list(expected)}")
    spread = scales.repeat_interleave(SCALE_BLOCK, -2)[..., :rows, :].repeat_interleave(SCALE_BLOCK, -1)[..., :columns]
    return (q.float() * spread).to(dtype)


def retile_columns(q: Tensor, scales: Tensor, *, pow2: bool = True, turned: bool = False) -> tuple[Tensor, Tensor]:
    """FP8 rows with 1x128 scales as FP8 with one scale per 128 tokens and 1 column, for GEMMs that sum over tokens.

    Error against `q * s`: at most `2^-4 |q s| (1 + 2^-20) + 2^-10 s'`. If both kinds of scales are powers of two, only
    the second term is left: a number moves along the exponents, and loses bits only where they run out.

    Args:
        q: float8_e4m3fn [T, H], T a multiple of 128 (grouped rows are padded with zeros).
        scales: FP32 [T, H / 128].
        pow2: whether the new scales are powers of two.
        turned: whether the rows of the result are the columns of `q`, as FP8 GEMMs want what they sum over.

    Returns:
        (float8_e4m3fn [T, H], or [H, T] if `turned`; FP32 scales [T / 128, H]).

    Raises:
        ConfigError: the shapes do not fit.
    """
    num_tokens, hidden = q.shape
    if num_tokens % SCALE_BLOCK:
        raise ConfigError(f"num_tokens={num_tokens} is no multiple of {SCALE_BLOCK}")
    x = dequantize(q, scales, torch.float32).reshape(-1, SCALE_BLOCK, hidden)
    new_scales = scales_of(largest_magnitude(x, (1,)), E4M3_MAX, pow2=pow2)
    columns = (x / new_scales.unsqueeze(1)).reshape(num_tokens, hidden).to(torch.float8_e4m3fn)
    return columns.t().contiguous() if turned else columns, new_scales


def dequantize_columns(q: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`q * s` of what `retile_columns` gives: q [T, H], scales FP32 [T / 128, H]; [T, H] of `dtype`.

    Raises:
        ConfigError: the shapes do not fit.
    """
    num_tokens, hidden = q.shape
    if tuple(scales.shape) != (num_tokens // SCALE_BLOCK, hidden) or num_tokens % SCALE_BLOCK:
        raise ConfigError(
            f"scales has shape {list(scales.shape)} for q {list(q.shape)}, the rule: [tokens / 128, hidden]"
        )
    return (q.float() * scales.repeat_interleave(SCALE_BLOCK, 0)).to(dtype)


def _tiles(w: Tensor) -> Tensor:
    """[..., N / 128, 128, K / 128, 128], filled up with zeros."""
    rows, columns = w.shape[-2:]
    w = pad(w, (0, -columns % SCALE_BLOCK, 0, -rows % SCALE_BLOCK))
    rows, columns = w.shape[-2:]
    return w.reshape(*w.shape[:-2], rows // SCALE_BLOCK, SCALE_BLOCK, columns // SCALE_BLOCK, SCALE_BLOCK)
