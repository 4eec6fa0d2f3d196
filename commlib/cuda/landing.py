"""Where the parts of a dispatch's output lie in its grant: what `dispatch_landing` in native/cuda/plan.cuh computes."""

from __future__ import annotations

from commlib.cuda.memory import ALIGNMENT
from commlib.cuda.params import Landing
from commlib.layout import align_up, record_bytes

__all__ = ["dispatch_landing"]


def dispatch_landing(
    num_rows: int, num_records: int, *, row_bytes: int, scales_bytes: int, num_topk: int, is_rows: bool, is_fresh: bool
) -> Landing:
    """Byte offsets.

    Args:
        num_rows: of the output.
        num_records: distinct tokens that may come.
        row_bytes, scales_bytes: of one row as it travels.
        num_topk: slots of a token.
        is_rows: layout "rows", not "grouped".
        is_fresh: not by handle: weights, expert ids and records come, too.
    """
    slots = num_rows * num_topk  # of layout "rows"
    landing = Landing(num_rows=num_rows, num_records=num_records, rows=0)
    landing.scales = align_up(num_rows * row_bytes, ALIGNMENT)
    landing.weights = landing.scales + align_up(num_rows * scales_bytes, ALIGNMENT)
    landing.topk_idx = landing.weights
    if is_fresh:
        landing.topk_idx += align_up((slots if is_rows else num_rows) * 4, ALIGNMENT)
    landing.output_bytes = landing.topk_idx + (align_up(slots * 8, ALIGNMENT) if is_fresh and is_rows else 0)
    landing.records = landing.output_bytes
    landing.total_bytes = landing.records
    if is_fresh:
        landing.total_bytes += align_up(num_records * record_bytes(num_topk), ALIGNMENT)
    return landing
