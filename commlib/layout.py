"""What dispatched rows look like in memory: pure arithmetic on sizes, no tensors of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from commlib.config import RuntimeConfig
from commlib.errors import ConfigError
from commlib.topology import Topology

__all__ = [
    "SCALE_BLOCK",
    "Layout",
    "align_up",
    "default_arena_bytes",
    "expected_rows",
    "format_bytes",
    "grouped_offsets",
    "most_rows",
    "num_scales",
    "record_bytes",
    "row_bytes",
]

SCALE_BLOCK = 128

_FP32_BYTES = 4
_PAGE_BYTES = 4096
_HEADROOM = 2


class Layout(StrEnum):
    """How a rank's received rows are ordered.

    GROUPED: one row per (token, local expert); local experts ascending, each padded to `expert_alignment` rows.
    ROWS: one row per token that has an expert on the rank; no padding.
    Both keep (source rank, token) order.
    """

    GROUPED = "grouped"
    ROWS = "rows"


def align_up(value: int, alignment: int) -> int:
    """The smallest multiple of `alignment` that is at least `value`."""
    if value < 0 or alignment < 1:
        raise ConfigError(f"value={value} must be >= 0 and alignment={alignment} >= 1")
    return -(-value // alignment) * alignment


def row_bytes(hidden: int, dtype_bytes: int) -> int:
    """Bytes of one row of `hidden` elements of `dtype_bytes` each."""
    if hidden < 1 or dtype_bytes < 1:
        raise ConfigError(f"hidden={hidden} and dtype_bytes={dtype_bytes} must both be >= 1")
    return hidden * dtype_bytes


def num_scales(hidden: int) -> int:
    """FP32 scales of one FP8 row: one per `SCALE_BLOCK` = 128 columns.

    Raises:
        ConfigError: `hidden` is not a multiple of 128.
    """
    if hidden < 1 or hidden % SCALE_BLOCK:
        raise ConfigError(f"hidden={hidden} is not a positive multiple of scale_block={SCALE_BLOCK}, which FP8 needs")
    return hidden // SCALE_BLOCK


def record_bytes(num_topk: int) -> int:
    """Bytes of the record that travels with a row: a head of 16 and 12 per slot of the token."""
    if num_topk < 1:
        raise ConfigError(f"num_topk={num_topk} is below 1")
    return 16 + 12 * num_topk


def grouped_offsets(num_tokens_per_expert: Sequence[int], alignment: int) -> npt.NDArray[np.int64]:
    """Where each local expert's rows start in layout "grouped".

    Args:
        num_tokens_per_expert: unpadded rows of each local expert.
        alignment: rows to a multiple of which each expert is padded.

    Returns:
        int64 [num_local_experts + 1]: expert i owns rows psum[i] .. psum[i + 1] - 1, the last of them padding;
        psum[-1] is the number of rows in all.
    """
    psum = np.zeros(len(num_tokens_per_expert) + 1, dtype=np.int64)
    for i, num_tokens in enumerate(num_tokens_per_expert):
        psum[i + 1] = psum[i] + align_up(int(num_tokens), alignment)
    return psum


def most_rows(num_tokens: int, num_topk: int, num_local_experts: int, alignment: int) -> int:
    """Rows that a rank gets in layout "grouped" if `num_tokens` tokens, those of all ranks, all choose its experts."""
    return num_tokens * min(num_topk, num_local_experts) + num_local_experts * (alignment - 1)


def expected_rows(config: RuntimeConfig, num_ranks: int, layout: Layout) -> int:
    """Rows that one rank receives if every rank sends `max_tokens` tokens and all experts get equally many.

    Padding included. For "rows" the slots of a token are taken to fall on different ranks as far as there are ranks,
    which is the most that a balanced choice can give.
    """
    config.check_ranks(num_ranks)
    if layout is Layout.ROWS:
        return config.max_tokens * min(config.num_topk, num_ranks)
    num_local_experts = config.num_experts // num_ranks
    rows_per_expert = -(-config.max_tokens * config.num_topk // num_local_experts)
    return num_local_experts * align_up(rows_per_expert, config.expert_alignment)


def default_arena_bytes(config: RuntimeConfig, topology: Topology, rank: int) -> int:
    """Initial heap of a rank's arena: one balanced dispatch and its combine's landing in FP32, twice over.

    The arena grows on demand, so this only has to be right often enough that growing is rare. The parts:
    rows in "grouped" with their row weights, one record per (token, rank), and a landing for the partial rows of the
    rank's own tokens and of those for which it is the rail: a token whose `num_topk` slots are spread evenly over all
    ranks has `ceil(num_topk * ranks of the node / num_ranks)` of them on this node.

    Returns:
        Bytes, a multiple of 4096, at most `config.max_arena_bytes`.
    """
    num_ranks = topology.num_ranks
    fp32_row = row_bytes(config.hidden, _FP32_BYTES)
    rows = expected_rows(config, num_ranks, Layout.GROUPED) * (fp32_row + _FP32_BYTES)
    records = expected_rows(config, num_ranks, Layout.ROWS) * record_bytes(config.num_topk)
    num_local_ranks = topology.num_local_ranks(rank)
    partials_per_token = min(num_local_ranks, -(-config.num_topk * num_local_ranks // num_ranks))
    num_sources = 1 + len(topology.in_sources(rank))
    landing_row = fp32_row + _FP32_BYTES * config.num_topk
    landing = config.max_tokens * num_sources * partials_per_token * landing_row
    return min(align_up(_HEADROOM * (rows + records + landing), _PAGE_BYTES), config.max_arena_bytes)


def format_bytes(num_bytes: int) -> str:
    """`num_bytes` for people, in binary units with three digits: "0 B", "1.5 KiB", "64 GiB"."""
    if num_bytes < 0:
        return "-" + format_bytes(-num_bytes)
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        # 999.5 and more would need a fourth digit after rounding.
        if value < 999.5:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"
