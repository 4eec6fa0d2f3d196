"""How many blocks, warps and bytes of shared memory each kernel gets: pure arithmetic, printable."""

from __future__ import annotations

from dataclasses import dataclass

from commlib.errors import ConfigError
from commlib.layout import SCALE_BLOCK, align_up

__all__ = ["MAX_SHARED_BYTES", "DispatchLaunch", "plan_dispatch", "push_limit_bytes"]

MAX_SHARED_BYTES = 227 * 1024  # of one block on compute capability 9.0
STAGES = 3  # kStages in native/cuda/bulk.cuh
_ZERO_BYTES = 2048  # kZeroBytes in native/cuda/dispatch.cu
_PENDING_BYTES = 8 * 32 * 4


@dataclass(frozen=True, kw_only=True)
class DispatchLaunch:
    """Shape of a dispatch kernel.

    Attributes:
        warps: of a block; the first `push_warps` of them push own rows before they help to expand.
        piece_bytes: most bytes of a given row that travel in one stage.
        shared_bytes: dynamic shared memory of a block.
    """

    warps: int
    push_warps: int
    piece_bytes: int
    shared_bytes: int


def _shared_bytes(warps: int, push_warps: int, piece_bytes: int, is_cast: bool) -> int:
    """What `carve` in native/cuda/dispatch.cu cuts; a kernel that was given less traps."""
    of_warp = STAGES * (piece_bytes + 32 * 8 + 8) + 16
    of_push = _PENDING_BYTES + (STAGES * 32 * 8 + piece_bytes // 64 if is_cast else 0)
    return _ZERO_BYTES + warps * of_warp + push_warps * of_push


def plan_dispatch(
    in_row_bytes: int, *, cast_element_bytes: int = 0, warps: int = 12, push_warps: int = 6
) -> DispatchLaunch:
    """The largest pieces that fit.

    Args:
        in_row_bytes: of a row as the caller gives it.
        cast_element_bytes: of one of its elements if it is cast to FP8 on the way, else 0.

    Raises:
        ConfigError: rows are no multiple of 16 bytes.
    """
    if in_row_bytes % 16:
        raise ConfigError(f"rows of {in_row_bytes} bytes are no multiple of 16 bytes, in which the GPU copies")
    unit = SCALE_BLOCK * cast_element_bytes or 16
    pieces = 1
    while True:
        piece_bytes = align_up(-(-in_row_bytes // pieces), unit)
        shared_bytes = _shared_bytes(warps, push_warps, piece_bytes, cast_element_bytes > 0)
        if shared_bytes <= MAX_SHARED_BYTES:
            return DispatchLaunch(
                warps=warps, push_warps=push_warps, piece_bytes=piece_bytes, shared_bytes=shared_bytes
            )
        pieces += 1


def push_limit_bytes(warps: int, piece_bytes: int) -> int:
    """Dynamic shared memory of the push_limit kernel."""
    return warps * (STAGES * (piece_bytes + 32 * 8 + 8) + 16)
