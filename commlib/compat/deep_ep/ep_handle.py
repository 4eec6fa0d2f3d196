"""`EPHandle`: what `ElasticBuffer.dispatch` leaves behind, with the fields that clients read."""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from typing import Any, NoReturn

import torch
from torch import Tensor

from commlib.compat.deep_ep.rows import aligned_counts
from commlib.compat.deep_ep.settings import not_covered
from commlib.handle import Handle
from commlib.runtime import Runtime

__all__ = ["EPHandle"]


def _describes_buffers(name: str) -> property:
    def refuse(self: Any) -> NoReturn:
        raise NotImplementedError(f"commlib's deep_ep does not cover EPHandle.{name}: it describes DeepEP's buffers")

    return property(refuse)


class EPHandle:
    """Routing of one dispatch, for any number of combines and cached dispatches. Needs no buffer.

    Counts become tensors when they are asked for. `recv_src_metadata` and the other fields that describe DeepEP's
    buffers raise NotImplementedError.

    Attributes:
        do_expand: one row per (token, local expert), else one per (token, rank).
        num_experts, expert_alignment, num_max_tokens_per_rank, num_sms: as given to the dispatch.
        topk_idx: int64 [num_tokens, num_topk].
        num_rows: rows given to the client.
        num_recv_tokens_per_expert_list: aligned counts; empty with `do_cpu_sync=False`.
        num_expanded_tokens: rows of an expanded dispatch, gaps included.
    """

    def __init__(
        self,
        *,
        runtime: Runtime,
        inner: Handle,
        do_expand: bool,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        topk_idx: Tensor,
        num_rows: int,
        is_synced: bool,
    ) -> None:
        self._runtime = runtime
        self._inner = inner
        self.do_expand = do_expand
        self.num_experts = runtime.config.num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.topk_idx = topk_idx
        self.num_rows = num_rows
        counts = aligned_counts(inner.num_tokens_per_expert, expert_alignment)
        self.num_recv_tokens_per_expert_list = counts if is_synced else []
        self.num_expanded_tokens = num_rows if do_expand else sum(counts)
        self._is_synced = is_synced

    @cached_property
    def num_recv_tokens(self) -> int:
        """Distinct (source rank, token) received; with `do_cpu_sync=False` the most that can be."""
        if self._is_synced:
            return sum(self._num_tokens_per_source)
        return self.num_max_tokens_per_rank * self._runtime.num_ranks

    @property
    def _num_tokens_per_source(self) -> list[int]:
        return [row[self._runtime.rank] for row in self._inner.num_tokens_per_rank()]

    @cached_property
    def psum_num_recv_tokens_per_scaleup_rank(self) -> Tensor:
        """int32 [ranks]: inclusive prefix sum of the distinct tokens from each rank of the group."""
        return self._int32(accumulate(self._num_tokens_per_source))

    @cached_property
    def psum_num_recv_tokens_per_expert(self) -> Tensor:
        """int32 [local experts]: where the rows of each expert end. Expanded: without the gap behind them, the next
        begins at the next multiple of the alignment. Else: inclusive prefix sum of the aligned counts.
        """
        counts = self._inner.num_tokens_per_expert
        ends = list(accumulate(aligned_counts(counts, self.expert_alignment)))
        if self.do_expand:
            ends = [start + count for start, count in zip([0, *ends], counts, strict=False)]
        return self._int32(ends)

    @cached_property
    def num_unaligned_recv_tokens_per_expert(self) -> Tensor:
        """int32 [local experts]: rows of each expert without gaps."""
        return self._int32(self._inner.num_tokens_per_expert)

    def _int32(self, values: Any) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self.topk_idx.device)

    recv_src_metadata = _describes_buffers("recv_src_metadata")
    dst_buffer_slot_idx = _describes_buffers("dst_buffer_slot_idx")
    token_metadata_at_forward = _describes_buffers("token_metadata_at_forward")
    channel_linked_list = _describes_buffers("channel_linked_list")
    deterministic_sort = not_covered("EPHandle.deterministic_sort", "rows come in order")
