"""The kernels of `fp8_gemm`, a program per tile. Triton reads their annotations, so they carry no others."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["rows_kernel", "weights_kernel"]


@triton.jit
def rows_kernel(
    x,
    x_scales,
    w,
    w_scales,
    ends,
    out,
    width,
    depth,
    num_rows,
    num_experts,
    num_columns: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
    height: tl.constexpr,
    together: tl.constexpr,
    is_added: tl.constexpr,
):
    """A tile of `height` rows and 128 columns of `out` [T, width], or what is added to it. Programs that run at one
    time share operands in the cache: `together` tiles one below the other, then the columns beside them."""
    group = tl.program_id(0) // (together * num_columns)
    number = tl.program_id(0) % (together * num_columns)
    tiles_below = min(num_rows // height - group * together, together)
    row = (group * together + number % tiles_below) * height
    column = number // tiles_below * block
    each = tl.arange(0, lanes)
    expert = tl.sum((tl.load(ends + each, mask=each < num_experts, other=2147483647) <= row).to(tl.int32))
    if expert < num_experts:
        rows, columns = row + tl.arange(0, height), column + tl.arange(0, block)
        blocks = depth // block
        x_scale_at = x_scales + rows.to(tl.int64) * blocks
        w_scale_at = w_scales + (expert * num_columns + column // block).to(tl.int64) * blocks
        total = tl.zeros((height, block), dtype=tl.float32)
        for k in range(blocks):
            of_rows = x.load([row, k * block])
            of_columns = w.load([expert * width + column, k * block])
            scale = tl.load(x_scale_at + k) * tl.load(w_scale_at + k)
            total += tl.dot(of_rows, of_columns.T) * scale[:, None]
        at = rows.to(tl.int64)[:, None] * width + columns[None, :]
        if is_added:
            total += tl.load(out + at).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty))


@triton.jit
def weights_kernel(
    grad,
    grad_scales,
    x,
    x_scales,
    ends,
    out,
    width,
    depth,
    num_columns: tl.constexpr,
    tiles: tl.constexpr,
    block: tl.constexpr,
    height: tl.constexpr,
):
    """A tile of `height` x 128 of an expert's `out` [E, width, depth]; `grad` [width, T] and `x` [depth, T]."""
    expert, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, column = tile // num_columns * height, tile % num_columns * block
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    rows, columns = row + tl.arange(0, height), column + tl.arange(0, block)
    row_scale_at = grad_scales + (first // block).to(tl.int64) * width + rows
    column_scale_at = x_scales + (first // block).to(tl.int64) * depth + columns
    total = tl.zeros((height, block), dtype=tl.float32)
    for k in range(first // block, end // block):
        of_rows = grad.load([row, k * block])
        of_columns = x.load([column, k * block])
        row_scales, column_scales = tl.load(row_scale_at), tl.load(column_scale_at)
        # One after the other: their product would want as many registers as the sum.
        total += tl.dot(of_rows, of_columns.T) * row_scales[:, None] * column_scales[None, :]
        row_scale_at += width
        column_scale_at += depth
    at = (expert.to(tl.int64) * width + rows)[:, None] * depth + columns[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty))
