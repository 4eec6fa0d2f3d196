"""What a dispatch returns besides rows: everything that combine and later dispatches by handle need."""

from __future__ import annotations

from typing import Any, NamedTuple

from commlib.layout import Layout

__all__ = ["Combined", "Dispatched", "Handle"]


class Handle:
    """The routing of one dispatch, the same operation on all ranks. Kept alive by whoever holds it.

    One handle serves any number of combines and dispatches, in any order, as long as all ranks agree on that order.
    Several handles may be alive. It belongs to the Runtime that made it.

    Attributes:
        layout: order of the rows.
        num_tokens: tokens this rank dispatched (rows of combine's result).
        num_rows: rows this rank received, padding included.
        num_tokens_per_expert: unpadded rows of each local expert (grouped), or tokens that chose it (rows): a tuple,
            or, of a dispatch with a `capacity`, an int32 tensor on the device.
    """

    def __init__(self, native: Any, layout: Layout, runtime_id: int) -> None:
        self._native = native
        self._runtime_id = runtime_id
        self.layout = layout
        self.num_tokens: int = native.num_tokens
        self.num_rows: int = native.num_rows
        counts = native.rows_per_expert
        self.num_tokens_per_expert: Any = tuple(counts) if isinstance(counts, list) else counts

    @property
    def epoch(self) -> int:
        """Number of the operation that made it, equal on all ranks."""
        return int(self._native.epoch)

    def load(self) -> list[int]:
        """Tokens per expert over all ranks [num_experts]: what the bias update of the gate wants; no communication."""
        return list(self._native.load)

    def num_tokens_per_rank(self) -> list[list[int]]:
        """[source rank][rank]: distinct tokens of the source with an expert on the rank; no communication."""
        return [list(row) for row in self._native.tokens_per_rank]

    def num_tokens_per_node(self) -> list[list[int]]:
        """[source rank][node]: distinct tokens of the source with an expert on the node."""
        return [list(row) for row in self._native.tokens_per_node]

    def __repr__(self) -> str:
        sizes = f"num_tokens={self.num_tokens}, num_rows={self.num_rows}"
        return f"Handle(epoch={self.epoch}, layout={self.layout}, {sizes})"


class Dispatched(NamedTuple):
    """Result of a dispatch. Arrays are views of this rank's arena; memory is reused once they are all gone.

    Attributes:
        x: [num_rows, hidden]. Grouped: local experts ascending, each padded to `expert_alignment` with zero rows,
            (source rank, token) ascending inside. Rows: one row per (source rank, token).
        scales: FP32 [num_rows, hidden / 128] of FP8 rows, else None.
        row_weights: grouped: FP32 [num_rows], 0 in padding; rows: None. By handle: None.
        topk_idx: rows: int64 [num_rows, num_topk], local expert ids, -1 elsewhere; grouped: None. By handle: None.
        topk_weights: rows: FP32 [num_rows, num_topk], 0 where `topk_idx` is -1; grouped: None. By handle: None.
        num_tokens_per_expert: see `Handle`.
        handle: for combine and for dispatches by handle.
    """

    x: Any
    scales: Any
    row_weights: Any
    topk_idx: Any
    topk_weights: Any
    num_tokens_per_expert: Any
    handle: Handle


class Combined(NamedTuple):
    """Result of a combine.

    Attributes:
        x: [num_tokens, hidden] sums.
        weight_grads: FP32 [num_tokens, num_topk], 0 for masked slots; None unless asked for.
    """

    x: Any
    weight_grads: Any
