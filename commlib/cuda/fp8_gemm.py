"""Grouped matrix products of FP8 operands on Hopper's FP8 tensor cores, in Triton.

torch has no grouped product with scales of 1x128 and 128x128 tiles, and a product per expert wants the sizes on the
host. Sums over 128 elements come from the tensor cores, which keep about 14 bits of them; these are scaled and added up
in FP32, as DeepSeek-V3 does (technical report, arXiv 2412.19437, section 3.3.2).

Rows of expert e are those from `ends[e - 1]` to `ends[e]`, multiples of 128. What lies after the last is not written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from commlib.cuda.calls import aligned
from commlib.cuda.driver import bind_context
from commlib.cuda.fp8_gemm_kernels import rows_kernel, weights_kernel
from commlib.errors import ConfigError
from commlib.layout import SCALE_BLOCK

__all__ = ["grouped_mm", "grouped_weight_grad"]

_TOGETHER = 8  # tiles one below the other that run at the same time


class _Tile(NamedTuple):
    """Of a program: its rows (128 columns each), and what it is launched with."""

    height: int
    warps: int
    stages: int


# One program of the first kind fits on a multiprocessor, and waits for itself where a tile begins and ends; three of
# the second, which take half as many bytes again from the cache.
_LARGE, _SMALL = _Tile(128, 8, 4), _Tile(64, 4, 3)
_FEW_STEPS = 32  # of 128: up to here begin and end weigh more (measured at 4, 16 and 56: docs/performance.md)


def grouped_mm(
    x: Tensor,
    x_scales: Tensor,
    w: Tensor,
    w_scales: Tensor,
    ends: Tensor,
    dtype: torch.dtype,
    add_to: Tensor | None = None,
) -> Tensor:
    """`y[r] = x[r] W[e]^T` for the rows r of each expert e.

    Args:
        x: float8_e4m3fn [T, K].
        x_scales: FP32 [T, K / 128].
        w: float8_e4m3fn [E, N, K].
        w_scales: FP32 [E, N / 128, K / 128].
        ends: int32 [E], on the device.
        dtype: of the result, BF16 or FP32.
        add_to: [T, N] of `dtype`, contiguous: the product is added to it, before anything is rounded.

    Returns:
        [T, N], `add_to` if that is given.

    Raises:
        ConfigError: shapes that do not fit, or a dimension that is no multiple of 128.
    """
    (num_rows, depth), (num_experts, width, w_depth) = x.shape, w.shape
    _check(num_rows, depth, width)
    _check_kinds((x, w), (x_scales, w_scales), ends)
    shapes = [list(each.shape) for each in (x_scales, w_scales, ends)]
    blocks = depth // SCALE_BLOCK
    expected = [[num_rows, blocks], [num_experts, width // SCALE_BLOCK, blocks], [num_experts]]
    if depth != w_depth or shapes != expected:
        raise ConfigError(f"x {list(x.shape)} and w {list(w.shape)} come with scales and ends {shapes}")
    out = torch.empty(num_rows, width, dtype=dtype, device=x.device) if add_to is None else add_to
    if add_to is not None and (list(out.shape), out.dtype, out.is_contiguous()) != ([num_rows, width], dtype, True):
        raise ConfigError(f"add_to is {out.dtype} {list(out.shape)}, the rule: contiguous {dtype} {[num_rows, width]}")
    if depth == 0 and add_to is None:
        out.zero_()
    elif out.numel() and num_experts and depth:
        columns, tile = width // SCALE_BLOCK, _SMALL if depth <= _FEW_STEPS * SCALE_BLOCK else _LARGE
        weights = _tiles(w.flatten(0, 1))
        _launch(
            rows_kernel,
            tile,
            num_rows // tile.height * columns,
            (_tiles(x, tile.height), x_scales.contiguous(), weights, w_scales.contiguous(), ends.contiguous(), out),
            (
                *(width, depth, num_rows, num_experts, columns, triton.next_power_of_2(num_experts)),
                *(SCALE_BLOCK, tile.height, _TOGETHER, add_to is not None),
            ),
        )
    return out


def grouped_weight_grad(
    grad: Tensor, grad_scales: Tensor, x: Tensor, x_scales: Tensor, ends: Tensor, dtype: torch.dtype
) -> Tensor:
    """`sum over the rows r of e: grad[r]^T x[r]`, of what `quant.retile_columns` gives if `turned`.

    Args:
        grad: float8_e4m3fn [N, T].
        grad_scales: FP32 [T / 128, N].
        x: float8_e4m3fn [K, T].
        x_scales: FP32 [T / 128, K].
        ends: int32 [E], on the device.
        dtype: of the result, BF16 or FP32.

    Returns:
        [E, N, K], zeros for an expert without rows.

    Raises:
        ConfigError: shapes that do not fit, or a dimension that is no multiple of 128.
    """
    (width, num_rows), (depth, x_rows) = grad.shape, x.shape
    _check(num_rows, depth, width)
    _check_kinds((grad, x), (grad_scales, x_scales), ends)
    shapes, blocks = [list(each.shape) for each in (grad_scales, x_scales)], num_rows // SCALE_BLOCK
    if num_rows != x_rows or shapes != [[blocks, width], [blocks, depth]] or ends.ndim != 1:
        raise ConfigError(f"grad {list(grad.shape)} and x {list(x.shape)} come with scales {shapes}")
    shape = (len(ends), width, depth)
    if num_rows == 0:
        return torch.zeros(shape, dtype=dtype, device=x.device)
    out = torch.empty(shape, dtype=dtype, device=x.device)
    if out.numel():
        columns, height = depth // SCALE_BLOCK, _SMALL.height
        tiles = width // height * columns
        _launch(
            weights_kernel,
            _SMALL,  # an expert's rows are few
            len(ends) * tiles,
            (_tiles(grad, height), grad_scales.contiguous(), _tiles(x), x_scales.contiguous(), ends.contiguous(), out),
            (width, depth, columns, tiles, SCALE_BLOCK, height),
        )
    return out


def _check(*sizes: int) -> None:
    if any(size % SCALE_BLOCK for size in sizes):
        raise ConfigError(f"rows, depth and width are {sizes}, the rule: multiples of {SCALE_BLOCK}")


def _check_kinds(operands: tuple[Tensor, ...], scales: tuple[Tensor, ...], ends: Tensor) -> None:
    kinds = ((operands, torch.float8_e4m3fn), (scales, torch.float32), ((ends,), torch.int32))
    for tensors, dtype in kinds:
        for each in tensors:
            if each.dtype != dtype or each.device != operands[0].device:
                raise ConfigError(f"{each.dtype} on {each.device}, the rule: {dtype} on {operands[0].device}")


def _tiles(matrix: Tensor, height: int = SCALE_BLOCK) -> Any:
    return TensorDescriptor.from_tensor(aligned(matrix), [height, SCALE_BLOCK])


def _launch(kernel: Any, tile: _Tile, programs: int, tensors: tuple[Any, ...], sizes: tuple[int, ...]) -> None:
    index = tensors[-1].get_device()
    with torch.cuda.device(index):
        bind_context(index)
        kernel[(programs,)](*tensors, *sizes, num_warps=tile.warps, num_stages=tile.stages)
