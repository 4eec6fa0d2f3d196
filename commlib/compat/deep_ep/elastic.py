"""`ElasticBuffer`: DeepEP's second interface, for dispatch and combine."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commlib.compat.deep_ep.ep_handle import EPHandle
from commlib.compat.deep_ep.other_primitives import STORAGE, OtherPrimitives
from commlib.compat.deep_ep.rows import (
    Input,
    arranged,
    check_room,
    copied,
    plus_bias,
    sent_back,
    split_scales,
)
from commlib.compat.deep_ep.runtimes import BufferBase, rank_and_size, topology_of
from commlib.compat.deep_ep.settings import DEFAULT_NUM_SMS
from commlib.compat.deep_ep.utils.event import EventHandle, EventOverlap, event_after, wait_for
from commlib.errors import ConfigError
from commlib.layout import Layout, align_up, record_bytes

__all__ = ["ElasticBuffer"]

_MAX_TOPK = 32


class ElasticBuffer(OtherPrimitives, BufferBase):
    """Dispatch and combine with DeepEP's second interface, for torch tensors of any device that commlib serves.

    Construction communicates nothing; the first dispatch of a shape opens a Runtime (see `runtimes`). Results are
    always deterministic, and experts' ranks always add up a token's rows before they send one.

    Args:
        group: torch ProcessGroup.
        num_bytes: kept as an attribute; None = `get_buffer_size_hint`.
        num_cpu_bytes: 0: host memory is for storage, which is not covered.
        num_max_tokens_per_rank: tokens that the first size of a Runtime's arena is meant for (it grows on demand), and
            the default of `dispatch`. Equal on all ranks.
        hidden, num_topk, use_fp8_dispatch: for the size hint.
        num_allocated_qps: what `get_theoretical_num_qps` returns at most.
        num_cpu_timeout_secs: seconds without progress after which a call raises.
        explicitly_destroy: whether `destroy` will be called.

    The others have no meaning here, but `prefer_overlap_with_compute` and the like are kept as attributes.

    Raises:
        NotImplementedError: `num_cpu_bytes` above 0.
    """

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        if num_cpu_bytes:
            raise NotImplementedError(f"commlib's deep_ep does not cover {num_cpu_bytes=}: {STORAGE}")
        limits: dict[str, Any] = {"timeout_s": float(num_cpu_timeout_secs)}
        if num_max_tokens_per_rank > 0:
            limits["max_tokens"] = num_max_tokens_per_rank
        super().__init__(group, explicitly_destroy=explicitly_destroy, limits=limits)
        self.rank_idx, self.num_ranks = self._rank, self._num_ranks
        hint = self.get_buffer_size_hint(group, num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch)
        self.num_bytes = hint if num_bytes is None else num_bytes
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.deterministic = deterministic
        self.allow_hybrid_mode, self.allow_multiple_reduction = allow_hybrid_mode, allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.num_allocated_qps = num_allocated_qps or DEFAULT_NUM_SMS

    # ---- settings

    @staticmethod
    def get_buffer_size_hint(
        group: Any,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes that arrive on a rank if all ranks send it all their tokens, in BF16 with their records.

        For comparisons, such as whether a larger batch needs another buffer: it grows with every argument that counts.
        No memory is taken for it.
        """
        _, num_ranks = rank_and_size(group)
        return num_ranks * num_max_tokens_per_rank * (2 * hidden + record_bytes(num_topk or _MAX_TOPK))

    @staticmethod
    def capture() -> EventHandle:
        """An event at this point of the current stream."""
        return EventHandle()

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The current stream: operations chain on it."""
        return torch.cuda.current_stream()

    def get_physical_domain_size(self) -> tuple[int, int]:
        """(nodes, ranks per node), from the first dispatch of the group on."""
        return topology_of(self.group)

    def get_logical_domain_size(self) -> tuple[int, int]:
        """(nodes, ranks per node), from the first dispatch of the group on."""
        return topology_of(self.group)

    def get_theoretical_num_sms(
        self, num_experts: int, num_topk: int, num_scaleout_topk: int = 0, **bandwidths_gbs: float
    ) -> int:
        """The default of RuntimeConfig."""
        return DEFAULT_NUM_SMS

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """At most `num_allocated_qps`, without further meaning."""
        return min(num_sms, self.num_allocated_qps)

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Returns when all ranks of the group have called it, with the work on their devices done before."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        dist.barrier(self.group)

    # ---- dispatch and combine

    def dispatch(
        self,
        x: Input,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | EventOverlap | None = None,
        previous_event_before_epilogue: EventHandle | EventOverlap | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Input, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Sends tokens to the ranks of their experts. Collective.

        Args:
            x: BF16 or FP32 [num_tokens, hidden], or E4M3 in a tuple with FP32 scales [num_tokens, hidden / 128].
            topk_idx: int64 [num_tokens, num_topk], -1 = none.
            topk_weights: FP32 [num_tokens, num_topk] or None, then none are returned.
            cumulative_local_expert_recv_stats: int32 [local experts], increased by what arrives.
            num_experts: experts over all ranks; needed without `handle`.
            num_sms: SMs that a kernel takes; counts in the first dispatch of a shape. 0 = the default.
            num_max_tokens_per_rank: for the number of rows without `do_cpu_sync`, equal on all ranks; None = the
                buffer's.
            expert_alignment: expanded: every expert's rows are padded to a multiple; else only counts are. None = 1.
            previous_event, previous_event_before_epilogue: waited for first.
            async_with_compute_stream: return an event.
            handle: repeat an earlier dispatch, in its layout; only rows are returned.
            do_handle_copy: the handle gets a copy of `topk_idx`.
            do_cpu_sync: False: as many rows as could arrive, those behind the last one zeros with `topk_idx` -1.
            do_expand: one row per (token, local expert), by expert, else one per (token, rank). Gaps are always zeros.
            use_tma_aligned_col_major_sf: scales with stride 1 along rows and a multiple of 4 along columns.

        Returns:
            (rows in the form of `x`, in ascending (source rank, token) order; int64 [rows, num_topk] local expert ids,
            -1 elsewhere, or None if expanded; FP32 [rows, num_topk] or, expanded, [rows]; handle; event).

        Raises:
            NotImplementedError: weights in a repeated dispatch; scales of another shape.
            ConfigError: neither `topk_idx` and `num_experts` nor `handle`; more rows than the most that was named; and
                as `Runtime.dispatch`.
        """
        wait_for(previous_event)
        wait_for(previous_event_before_epilogue)
        rows, scales = split_scales(x)
        if handle is not None:
            if topk_weights is not None:
                raise NotImplementedError("commlib's deep_ep repeats a dispatch without weights")
            got = handle._runtime.dispatch(rows, topk_idx, scales=scales, handle=handle._inner)
            recv = arranged(got.x, got.scales, handle.num_rows, use_tma_aligned_col_major_sf)
            return recv, None, None, handle, event_after(async_with_compute_stream)
        if topk_idx is None or num_experts is None:
            raise ConfigError("dispatch needs topk_idx and num_experts, or a handle")
        runtime = self._runtime(rows, num_experts, topk_idx.shape[1], num_sms=num_sms or DEFAULT_NUM_SMS)
        alignment = expert_alignment or 1
        got = runtime.dispatch(
            rows,
            topk_idx,
            topk_weights,
            scales=scales,
            layout=Layout.GROUPED if do_expand else Layout.ROWS,
            expert_alignment=alignment,
        )
        if cumulative_local_expert_recv_stats is not None:
            stats = cumulative_local_expert_recv_stats
            stats.add_(torch.tensor(got.num_tokens_per_expert, dtype=stats.dtype).to(stats.device))
        most = self.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
        is_synced = do_cpu_sync is not False
        num_rows = got.handle.num_rows
        if not is_synced:
            num_rows = self._worst_rows(most, num_experts, topk_idx.shape[1], alignment if do_expand else None)
            check_room(got.handle, num_rows, f"num_max_tokens_per_rank={most}", alignment)
        new = EPHandle(
            runtime=runtime,
            inner=got.handle,
            do_expand=do_expand,
            expert_alignment=alignment,
            num_max_tokens_per_rank=most,
            num_sms=num_sms or DEFAULT_NUM_SMS,
            topk_idx=topk_idx.clone() if do_handle_copy else topk_idx,
            num_rows=num_rows,
            is_synced=is_synced,
        )
        weights = got.row_weights if do_expand else got.topk_weights
        return (
            arranged(got.x, got.scales, num_rows, use_tma_aligned_col_major_sf),
            None if do_expand else copied(got.topk_idx, num_rows, fill=-1),
            None if topk_weights is None else copied(weights, num_rows),
            new,
            event_after(async_with_compute_stream),
        )

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: EventHandle | EventOverlap | None = None,
        previous_event_before_epilogue: EventHandle | EventOverlap | None = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sums, for every token, its rows on all ranks; unweighted. Collective.

        Args:
            x: BF16 or FP32 [rows, hidden], in the order of the dispatch.
            handle: of the dispatch, of this or another buffer.
            topk_weights: FP32 [rows, num_topk], or [rows] if expanded: each slot's value returns from the one rank that
                has its expert. On all ranks or on none.
            bias: one or two tensors [num_tokens, hidden] to add.
            previous_event, previous_event_before_epilogue: waited for first.
            async_with_compute_stream: return an event.

        Returns:
            ([num_tokens, hidden] in the dtype of `x`; FP32 [num_tokens, num_topk], 0 where masked, or None; event).
        """
        wait_for(previous_event)
        wait_for(previous_event_before_epilogue)
        inner, given = handle._inner, handle.num_rows
        grads = None if topk_weights is None else sent_back(topk_weights, given, inner.num_rows)
        out = handle._runtime.combine(sent_back(x, given, inner.num_rows), inner, weight_grads=grads)
        return plus_bias(out.x, bias), out.weight_grads, event_after(async_with_compute_stream)

    def _worst_rows(self, most: int, num_experts: int, num_topk: int, alignment: int | None) -> int:
        """Rows that arrive at most if ranks send `most` tokens each; `alignment` is None unless expanded."""
        worst = most * self.num_ranks
        if alignment is not None:
            num_local_experts = num_experts // self.num_ranks
            gaps = (alignment - 1) * num_local_experts
            worst = align_up(worst * min(num_topk, num_local_experts) + gaps, alignment)
        return worst
