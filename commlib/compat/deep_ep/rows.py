"""Rows as clients hand them in and want them back: with scales, in a fixed number, with biases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from commlib.errors import ConfigError
from commlib.handle import Handle
from commlib.layout import SCALE_BLOCK, Layout, align_up

__all__ = [
    "Input",
    "aligned_counts",
    "arranged",
    "check_room",
    "copied",
    "join_scales",
    "plus_bias",
    "received",
    "resized",
    "sent_back",
    "split_scales",
]

# Rows of a tensor that Hopper's bulk copies take along columns: 16 bytes of 4-byte scales.
_TMA_ALIGNED_SCALES = 4

# BF16 or FP32 rows, or E4M3 rows with their scales.
Input = Tensor | tuple[Tensor, Tensor]


def split_scales(x: Input) -> tuple[Tensor, Tensor | None]:
    """`x` as (rows, scales or None).

    Raises:
        NotImplementedError: scales other than one FP32 per token and 128 columns.
    """
    if isinstance(x, Tensor):
        return x, None
    rows, scales = x
    num_tokens, hidden = rows.shape
    if scales.dtype != torch.float32 or tuple(scales.shape) != (num_tokens, hidden // SCALE_BLOCK):
        raise NotImplementedError(
            f"commlib's deep_ep carries FP8 rows with float32 scales [{num_tokens}, {hidden // SCALE_BLOCK}] "
            f"(1x{SCALE_BLOCK}), not {scales.dtype} {list(scales.shape)}"
        )
    return rows, scales


def join_scales(rows: Tensor, scales: Tensor | None) -> Input:
    """The inverse of `split_scales`."""
    return rows if scales is None else (rows, scales)


def resized(tensor: Tensor, num_rows: int, fill: float = 0) -> Tensor:
    """The first `num_rows` of `tensor`, and rows of `fill` behind them if there are fewer. Copies only to add."""
    have = tensor.shape[0]
    if num_rows <= have:
        return tensor if num_rows == have else tensor[:num_rows]
    if tensor.dtype == torch.float8_e4m3fn:  # few operations know it; +0 is all zero bits
        return resized(tensor.view(torch.uint8), num_rows).view(tensor.dtype)
    out = tensor.new_full((num_rows, *tensor.shape[1:]), fill)
    out[:have] = tensor
    return out


def copied(tensor: Tensor, num_rows: int, fill: float = 0) -> Tensor:
    """`resized`, always in memory of its own: a client that keeps a small array must not keep the rows, which lie in
    the same slab of the arena.
    """
    out = resized(tensor, num_rows, fill)
    return out.clone() if num_rows <= tensor.shape[0] else out


def check_room(handle: Handle, room: int, rule: str, expert_alignment: int = 1) -> None:
    """A fixed number of rows has to do for what every rank receives. All ranks know all counts: with the same `room`
    they all raise, or none.

    Args:
        handle: of the dispatch.
        room: rows.
        rule: where the number comes from, for the message.
        expert_alignment: of a grouped dispatch.

    Raises:
        ConfigError: a rank has received more.
    """
    per_rank = handle.num_tokens_per_rank()
    if handle.layout is Layout.ROWS:
        received_rows = [sum(column) for column in zip(*per_rank, strict=True)]
    else:
        load = handle.load()
        step = len(load) // len(per_rank)
        received_rows = [
            sum(align_up(count, expert_alignment) for count in load[first : first + step])
            for first in range(0, len(load), step)
        ]
    most = max(received_rows)
    if most > room:
        raise ConfigError(f"rank {received_rows.index(most)} receives {most} rows, {rule} has room for {room}")


def received(rows: Tensor, scales: Tensor | None, num_rows: int) -> Input:
    """What a dispatch returned, in the number of rows that the client counts on."""
    return join_scales(resized(rows, num_rows), None if scales is None else resized(scales, num_rows))


def arranged(rows: Tensor, scales: Tensor | None, num_rows: int, is_column_major: bool) -> Input:
    """`received`; column-major: scales with stride 1 along rows and a multiple of 4 along columns."""
    recv = received(rows, scales, num_rows)
    if isinstance(recv, Tensor) or not is_column_major:
        return recv
    rows, scales = recv
    stride = align_up(num_rows, _TMA_ALIGNED_SCALES)
    columns = scales.new_empty((scales.shape[1], stride))[:, :num_rows].t()
    return join_scales(rows, columns.copy_(scales))


def sent_back(tensor: Tensor, num_handed_out: int, num_rows: int) -> Tensor:
    """What a client returns for combine, as the Runtime wants it: without the rows that `received` added, with zeros
    for those it cut off. A wrong number of rows stays wrong, for the Runtime to refuse on all ranks.
    """
    return resized(tensor, num_rows) if tensor.shape[0] == num_handed_out else tensor


def plus_bias(out: Tensor, bias: Tensor | tuple[Tensor, Tensor] | None) -> Tensor:
    """`out` plus no, one or two biases of its shape, summed in FP32 and rounded once."""
    if bias is None:
        return out
    total = out.float()
    for each in (bias,) if isinstance(bias, Tensor) else bias:
        total = total + each.float()
    return total.to(out.dtype)


def aligned_counts(num_tokens_per_expert: Sequence[int], alignment: int) -> list[int]:
    """Every count rounded up to a multiple of `alignment`."""
    return [align_up(count, alignment) for count in num_tokens_per_expert]
