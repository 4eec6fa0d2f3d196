"""How many blocks, warps and bytes of shared memory each kernel gets: pure arithmetic, printable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from commlib.cuda.params import ExchangeHeader, sizeof
from commlib.errors import ConfigError
from commlib.layout import SCALE_BLOCK, align_up

__all__ = [
    "LATENCY_COMBINE_WARPS",
    "LATENCY_WARPS",
    "MAX_LATENCY_EXPERTS",
    "MAX_PARTS",
    "MAX_SHARED_BYTES",
    "Launch",
    "Packets",
    "Tuning",
    "choices_bytes",
    "message_packets",
    "plan_combine",
    "plan_dispatch",
    "plan_latency_combine",
    "plan_packets",
    "plan_tier_combine",
    "push_limit_bytes",
    "settle_bytes",
]

MAX_SHARED_BYTES = 226 * 1024  # dynamic, of one block on compute capability 9.0; 1 KiB is left for static variables
STAGES = 4  # kStages in native/cuda
TIER_COMBINE_WARPS = 12  # of tier_combine_*.cu, which need more registers than combine_*.cu
LATENCY_WARPS = 16  # of a block in the latency regime's dispatch: a part of a row each
LATENCY_COMBINE_WARPS = 12  # likewise, of its combine
MAX_PARTS = 16  # of a partial row there, kMaxParts in native/cuda/latency.cuh
MAX_LATENCY_EXPERTS = 4094  # kBadChoice in native/cuda/latency_choices.cuh
_CHOICES_OF_PACKET = 8  # kTogetherChosen there
_PACKET_PAYLOAD = 12  # kPacketPayload in native/cuda/packet.cuh
_LATENCY_STAGES = 2  # PiecePipe::kStages in native/cuda/latency_row.cuh
_MAX_LATENCY_PIECE = 2048  # of BF16, 8 blocks of 128 columns: one round of cast_piece_pow2
_COUNT_WORDS = 16  # kCountWords in native/cuda/count.cuh
_WARP_ALIGNMENT = 128  # RowPipe::kAlignment
_MAX_COMBINE_PIECE = 7 * 512  # kVectors in native/cuda/sum.cuh: what a warp sums in registers
_SCALES_OF_BULK = 4  # scales of pieces that have a multiple of so many are copied in bulk, see Caster in carrier.cuh
_GOOD_UNIT = 512  # pieces that are multiples of this start on whole lines: a third slower otherwise


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What may be varied without changing any result.

    Attributes:
        dispatch_warps: of a block; shared memory is divided among them.
        push_warps: of these, how many push before they help to expand.
        cast_push_warps: likewise where rows are cast.
        rows_push_warps: likewise in layout "rows", which has no copies to make.
        combine_warps: of a block.
        final_warps: of these, how many sum own tokens from the start.
        rows_final_warps: likewise in layout "rows", where an expert rank has one row per record to move.
    """

    dispatch_warps: int = 14
    push_warps: int = 7
    cast_push_warps: int = 12
    rows_push_warps: int = 14
    combine_warps: int = 15
    final_warps: int = 2
    rows_final_warps: int = 7


def _table_bytes(lanes: int, rows: int) -> int:
    """RowPipe::kTableBytes and Announcer::kBytes in native/cuda/bulk.cuh; `rows` is its kRows."""
    return align_up(STAGES * (lanes * 8 + 8 + 4), 16) + rows * (lanes * 4 + 4)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Shape of a kernel that moves rows.

    Attributes:
        warps: of a block.
        piece_bytes: most bytes of a row that travel in one stage.
        shared_bytes: dynamic shared memory of a block; the kernel traps if it is less than it cuts up.
    """

    warps: int
    piece_bytes: int
    shared_bytes: int


def _pieces(row_bytes: int, unit: int, max_piece: int) -> list[int]:
    """Sizes of pieces to choose from, largest first."""
    if row_bytes % 16:
        raise ConfigError(f"rows of {row_bytes} bytes are no multiple of 16 bytes, in which the GPU copies")
    sizes = {align_up(-(-row_bytes // pieces), unit) for pieces in range(1, -(-row_bytes // unit) + 1)}
    return sorted((size for size in sizes if size <= max_piece), reverse=True)


@cache
def plan_dispatch(in_row_bytes: int, tuning: Tuning, *, cast_element_bytes: int = 0) -> Launch:
    """The largest pieces that fit.

    Args:
        in_row_bytes: of a row as the caller gives it.
        tuning: warps.
        cast_element_bytes: of one of its elements if it is cast to FP8 on the way, else 0.

    Raises:
        ConfigError: rows are no multiple of 16 bytes, or there are too many warps.
    """
    unit = SCALE_BLOCK * cast_element_bytes if cast_element_bytes else min(_GOOD_UNIT, align_up(in_row_bytes, 16))
    if cast_element_bytes and in_row_bytes % (_SCALES_OF_BULK * unit) == 0:
        unit *= _SCALES_OF_BULK
    for piece in _pieces(in_row_bytes, unit, in_row_bytes + unit):
        cast = STAGES * (32 * 8 + align_up(piece // 64, 16)) if cast_element_bytes else 0
        of_warp = align_up(STAGES * piece + _table_bytes(32, 8) + cast, _WARP_ALIGNMENT)
        shared_bytes = tuning.dispatch_warps * of_warp
        if shared_bytes <= MAX_SHARED_BYTES:
            return Launch(warps=tuning.dispatch_warps, piece_bytes=piece, shared_bytes=shared_bytes)
    raise ConfigError(f"{tuning} leaves no shared memory for rows of {in_row_bytes} bytes")


@cache
def plan_combine(row_bytes: int, tuning: Tuning, *, aside_bytes: int = 0) -> Launch:
    """The largest pieces that fit; raises like `plan_dispatch`.

    Args:
        row_bytes: of a row.
        tuning: warps.
        aside_bytes: of each warp, behind the pieces of all.
    """
    for piece in _pieces(row_bytes, min(_GOOD_UNIT, align_up(row_bytes, 16)), _MAX_COMBINE_PIECE):
        of_warp = align_up(STAGES * piece + _table_bytes(1, 16) + STAGES * 8, _WARP_ALIGNMENT)
        shared_bytes = tuning.combine_warps * (of_warp + aside_bytes)
        if shared_bytes <= MAX_SHARED_BYTES:
            return Launch(warps=tuning.combine_warps, piece_bytes=piece, shared_bytes=shared_bytes)
    raise ConfigError(f"{tuning} leaves no shared memory for rows of {row_bytes} bytes")


def plan_tier_combine(row_bytes: int, element_bytes: int, tuning: Tuning) -> Launch:
    """Between nodes: fewer warps, each with room for a piece's sums in FP32 (carve_aside in tier_final_reduce.cuh)."""
    warps = min(tuning.combine_warps, TIER_COMBINE_WARPS)
    aside_bytes = _MAX_COMBINE_PIECE // element_bytes * 4
    return plan_combine(row_bytes, replace(tuning, combine_warps=warps), aside_bytes=aside_bytes)


def plan_latency_combine(row_bytes: int) -> Launch:
    """Combine of the latency regime: a row is cut into parts, one piece each.

    Args:
        row_bytes: of a row of BF16.

    Raises:
        ConfigError: rows are no multiple of 16 bytes, or wider than `MAX_PARTS` parts.
    """
    launch = plan_combine(row_bytes, Tuning(combine_warps=LATENCY_COMBINE_WARPS))
    if row_bytes > MAX_PARTS * launch.piece_bytes:
        raise ConfigError(f"rows of {row_bytes} bytes are too wide for the latency regime: {launch}")
    return launch


@dataclass(frozen=True, kw_only=True)
class Packets:
    """How the latency regime's dispatch cuts rows: into parts of one piece, parts into packets (packet.cuh).

    Attributes:
        piece_bytes: most bytes of a row, as the caller gives it, in a part.
        part_bytes: of a part's packets.
        slot_bytes: of all parts of a row.
        shared_bytes: dynamic shared memory of a block's warps, carve_rows in native/cuda/latency_row.cuh.
    """

    piece_bytes: int
    part_bytes: int
    slot_bytes: int
    shared_bytes: int


@cache
def plan_packets(row_bytes: int, room: int, *, is_cast: bool) -> Packets:
    """Parts of about the same size, the largest that leave a block room for the choices.

    Args:
        row_bytes: of a row of BF16.
        room: `MAX_SHARED_BYTES` less `choices_bytes`.
        is_cast: rows are cast to FP8 on the way.

    Raises:
        ConfigError: rows are no multiple of 16 bytes, or the choices leave no room.
    """
    unit = 2 * SCALE_BLOCK if is_cast else 16
    for piece in _pieces(row_bytes, _GOOD_UNIT if row_bytes % _GOOD_UNIT == 0 else unit, _MAX_LATENCY_PIECE):
        stages = _LATENCY_STAGES * (align_up(piece + 8, _WARP_ALIGNMENT) + 8)
        of_warp = align_up(stages + align_up(piece // 64, 16), _WARP_ALIGNMENT)
        if LATENCY_WARPS * of_warp > room:
            continue
        payload = piece // 2 + piece // 2 // SCALE_BLOCK * 4 if is_cast else piece
        part_bytes = align_up(-(-payload // _PACKET_PAYLOAD) * 16, _WARP_ALIGNMENT)
        return Packets(
            piece_bytes=piece,
            part_bytes=part_bytes,
            slot_bytes=-(-row_bytes // piece) * part_bytes,
            shared_bytes=LATENCY_WARPS * of_warp,
        )
    raise ConfigError(
        f"rows of {row_bytes} bytes find {room} bytes of shared memory beside the choices of all ranks' tokens: "
        "give the Runtime fewer decode_tokens"
    )


def message_packets(decode_tokens: int, num_topk: int) -> int:
    """Of a message of the latency regime: a head and the choices, see native/cuda/latency_choices.cuh."""
    return 1 + -(-decode_tokens * num_topk // _CHOICES_OF_PACKET)


def choices_bytes(decode_tokens: int, num_topk: int, num_experts: int, num_ranks: int) -> int:
    """What a block of the latency regime's dispatch shares: Choices in native/cuda/latency_choices.cuh, then Places in
    latency_places.cuh."""
    local, words = num_experts // num_ranks, -(-decode_tokens // 32)
    chosen = num_ranks * (message_packets(decode_tokens, num_topk) - 1) * _CHOICES_OF_PACKET
    words_of_choices = num_ranks * words * local + num_experts + num_ranks + -(-local // 32)
    words_of_places = num_experts + 2 * local
    return align_up(8 * num_ranks, 16) + 2 * chosen + 4 * (words_of_choices + words_of_places)


def settle_bytes(num_experts: int, num_ranks: int, count_blocks: int = 0, tokens_per_block: int = 0) -> int:
    """Dynamic shared memory for the head of an operation: what a block counts in, TokenBits in native/cuda/count.cuh,
    then Ledger in native/cuda/agree.cuh.

    Raises:
        ConfigError: more than a block has.
    """
    columns = num_experts + num_ranks
    ledger = num_ranks * (sizeof(ExchangeHeader) // 4) + (count_blocks + num_ranks) * columns
    ledger += num_experts + num_ranks**2 + num_ranks
    words = min(_COUNT_WORDS, -(-tokens_per_block // 32))
    total = 4 * max((1 + 2 * words) * columns if count_blocks else 0, ledger)
    if total > MAX_SHARED_BYTES:
        raise ConfigError(
            f"num_experts={num_experts} over num_ranks={num_ranks}, counted by {count_blocks} blocks, needs {total} "
            f"bytes of shared memory, a block has {MAX_SHARED_BYTES}"
        )
    return total


def push_limit_bytes(warps: int, piece_bytes: int) -> int:
    """Dynamic shared memory of the push_limit kernel."""
    return warps * align_up(STAGES * piece_bytes + _table_bytes(1, 0), _WARP_ALIGNMENT)
