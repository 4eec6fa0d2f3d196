"""Low-latency mode of `Buffer`: results in slots of a fixed number per expert, reduction with weights, hooks, masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from commlib.compat.deep_ep.rows import Input
from commlib.compat.deep_ep.runtimes import BufferBase
from commlib.compat.deep_ep.settings import DEFAULT_NUM_SMS
from commlib.compat.deep_ep.utils.event import EventOverlap, event_after
from commlib.errors import ConfigError
from commlib.handle import Dispatched, Handle
from commlib.layout import SCALE_BLOCK, Layout
from commlib.runtime import Runtime

__all__ = ["LowLatencyBuffer", "LowLatencyHandle", "packed_exponents"]

# Columns of the rows that carry nothing but their routing weights.
_WEIGHTS_HIDDEN = 128
_SCALES_PER_WORD = 4

Hook = Callable[[], None]


class Received(NamedTuple):
    """A dispatch that has arrived: row i of the Runtime's result is at [expert[i], slot[i]] of the client's."""

    inner: Handle
    expert: Tensor
    slot: Tensor


@dataclass
class LowLatencyHandle:
    """Routing of one dispatch; `received` once it has been received."""

    runtime: Runtime
    topk_idx: Tensor
    num_experts: int
    num_slots: int
    received: Received | None = None
    combine_buffer: Tensor | None = None


def packed_exponents(scales: Tensor) -> Tensor:
    """UE8M0: the exponent bytes of four neighbouring scales in a word, the first one lowest.

    Args:
        scales: FP32 [n, k], powers of two, k a multiple of 4.

    Returns:
        int32 [n, k / 4].
    """
    num_rows, count = scales.shape
    if count % _SCALES_PER_WORD:
        raise ConfigError(f"use_ue8m0 packs {_SCALES_PER_WORD} scales in a word; a row has {count}")
    exponents = (scales.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return exponents.view(torch.int32).view(num_rows, count // _SCALES_PER_WORD)


class LowLatencyBuffer(BufferBase):
    """The low-latency methods of `Buffer`."""

    num_sms: ClassVar[int] = DEFAULT_NUM_SMS

    def __init__(self, group: Any, *, explicitly_destroy: bool, limits: dict[str, Any]) -> None:
        super().__init__(group, explicitly_destroy=explicitly_destroy, limits=limits)
        self._masked: set[int] = set()

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes of one dispatch's result in BF16 on one rank. Nothing has to be set aside for it."""
        return num_experts * num_max_dispatch_tokens_per_rank * hidden * 2

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to clean: operations do not depend on what earlier ones left."""

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Input, Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Sends tokens to their experts; every expert has `ranks * num_max_dispatch_tokens_per_rank` slots. Collective.

        Args:
            x: BF16 or FP32 [num_tokens, hidden].
            topk_idx: int64 [num_tokens, num_topk], -1 = none; not to be changed before combine.
            num_max_dispatch_tokens_per_rank: at least `num_tokens`, equal on all ranks.
            num_experts: experts over all ranks.
            cumulative_local_expert_recv_stats: int32 [local experts], increased by what arrives.
            use_fp8: cast to E4M3 on the way, 1x128 scales.
            round_scale: scales are powers of two.
            use_ue8m0: and handed out as packed exponents.
            async_finish: return an event.
            return_recv_hook: return before anything has arrived; results are there after the hook.

        Returns:
            ([local experts, slots, hidden] in the dtype of `x`, or (E4M3, FP32 scales [local experts, slots, hidden /
            128] or int32 [.., hidden / 512], the last two dimensions column-major); int32 [local experts] tokens per
            expert, first slots first, those behind them undefined; handle; event; hook or None).

        Raises:
            NotImplementedError: with `dispatch_wait_recv_cost_stats`.
            ConfigError: a rank has more tokens than that; on every rank, as by the Runtime.
        """
        if dispatch_wait_recv_cost_stats is not None:
            raise NotImplementedError("commlib's deep_ep does not cover dispatch_wait_recv_cost_stats")
        if use_ue8m0 and not (use_fp8 and round_scale):
            raise ConfigError("use_ue8m0 needs use_fp8 and round_scale")
        topk_idx = self._without_masked(topk_idx, num_experts)
        runtime = self._runtime(x, num_experts, topk_idx.shape[1], num_sms=self.num_sms)
        if x.shape[0] > num_max_dispatch_tokens_per_rank:
            runtime.refuse(f"{x.shape[0]} tokens exceed {num_max_dispatch_tokens_per_rank=}")
        fp8 = None if not use_fp8 else "pow2" if round_scale else "fp32"
        pending = runtime.dispatch_send(x, topk_idx, layout=Layout.GROUPED, expert_alignment=1, fp8=fp8)
        handle = LowLatencyHandle(
            runtime, topk_idx, num_experts, num_slots=self._num_ranks * num_max_dispatch_tokens_per_rank
        )
        num_local_experts = num_experts // self._num_ranks
        shape = (num_local_experts, handle.num_slots, x.shape[1])
        rows = x.new_empty(shape, dtype=torch.float8_e4m3fn if use_fp8 else x.dtype)
        scales = _empty_scales(x, shape, use_ue8m0) if use_fp8 else None
        count = torch.zeros(num_local_experts, dtype=torch.int32, device=x.device)

        def receive() -> None:
            got = runtime.dispatch_recv(pending)
            _unpack(got, handle, rows, scales)
            count.copy_(torch.tensor(got.num_tokens_per_expert, dtype=torch.int32))
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(count)

        hook = _now_or_later(receive, return_recv_hook)
        return rows if scales is None else (rows, scales), count, handle, event_after(async_finish), hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """The sum, for every token, of its experts' rows times its weights. Collective.

        Experts' ranks learn the weights by a small dispatch of their own before the sum.

        Args:
            x: BF16 or FP32 [local experts, slots, hidden].
            topk_idx: as in the dispatch, from whose handle it is taken.
            topk_weights: FP32 [num_tokens, num_topk].
            handle: of the dispatch, which has been received.
            zero_copy: take the rows from what `get_next_low_latency_combine_buffer` returned, not from `x`.
            async_finish: return an event.
            return_recv_hook: the result is there after the hook only.
            out: [num_tokens, hidden], written and returned.

        Returns:
            ([num_tokens, hidden], event, hook or None).

        Raises:
            NotImplementedError: with `use_logfmt` or `combine_wait_recv_cost_stats`.
        """
        if use_logfmt or combine_wait_recv_cost_stats is not None:
            raise NotImplementedError("commlib's deep_ep does not cover use_logfmt and combine_wait_recv_cost_stats")
        received = handle.received
        if received is None:
            raise ConfigError("combine before its dispatch has been received: call the dispatch's hook first")
        if zero_copy:
            if handle.combine_buffer is None:
                raise ConfigError("zero_copy needs get_next_low_latency_combine_buffer before it")
            x = handle.combine_buffer
        runtime = handle.runtime
        y = x[received.expert, received.slot]
        pending = runtime.combine_send(y, received.inner, weights=self._row_weights(x, topk_weights, handle))
        result = y.new_empty((received.inner.num_tokens, x.shape[2])) if out is None else out

        def receive() -> None:
            result.copy_(runtime.combine_recv(pending).x)

        hook = _now_or_later(receive, return_recv_hook)
        return result, event_after(async_finish), hook

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> Tensor:
        """BF16 [local experts, slots, hidden] to fill for a combine with `zero_copy`; memory of its own."""
        shape = (handle.num_experts // self._num_ranks, handle.num_slots, handle.runtime.config.hidden)
        handle.combine_buffer = torch.zeros(shape, dtype=torch.bfloat16, device=handle.topk_idx.device)
        return handle.combine_buffer

    # ---- masks: this rank's tokens do without the experts of masked ranks

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Masks a rank, or unmasks it: this rank sends it no tokens in low-latency mode. It still has to take part in
        every call, and its own tokens are still received: a rank that is gone raises an error instead.
        """
        if not 0 <= rank_to_mask < self._num_ranks:
            raise ConfigError(f"rank_to_mask={rank_to_mask} is not in 0..{self._num_ranks - 1}")
        (self._masked.add if mask else self._masked.discard)(rank_to_mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Sets int32 [ranks] to 1 for masked ranks and to 0 for the others."""
        status = [int(rank in self._masked) for rank in range(self._num_ranks)]
        mask_status.copy_(torch.tensor(status, dtype=mask_status.dtype))

    def low_latency_clean_mask_buffer(self) -> None:
        """Unmasks all ranks."""
        self._masked.clear()

    def _without_masked(self, topk_idx: Tensor, num_experts: int) -> Tensor:
        if not self._masked:
            return topk_idx
        owner = topk_idx.div(num_experts // self._num_ranks, rounding_mode="floor")
        masked = torch.tensor(sorted(self._masked), device=topk_idx.device)
        return topk_idx.masked_fill(torch.isin(owner, masked), -1)

    def _row_weights(self, x: Tensor, topk_weights: Tensor, handle: LowLatencyHandle) -> Any:
        """FP32 [rows] of the dispatch: the routing weight of each row, sent by the tokens' ranks."""
        idx = handle.topk_idx
        runtime = self._runtime(x, handle.num_experts, idx.shape[1], num_sms=self.num_sms, hidden=_WEIGHTS_HIDDEN)
        blank = x.new_zeros((idx.shape[0], _WEIGHTS_HIDDEN))
        return runtime.dispatch(blank, idx, topk_weights, layout=Layout.GROUPED, expert_alignment=1).row_weights


def _empty_scales(x: Tensor, shape: tuple[int, int, int], is_packed: bool) -> Tensor:
    """Scales for results of `shape`, slots next to each other in memory."""
    num_local_experts, num_slots, hidden = shape
    columns = hidden // SCALE_BLOCK // (_SCALES_PER_WORD if is_packed else 1)
    dtype = torch.int32 if is_packed else torch.float32
    return x.new_empty((num_local_experts, columns, num_slots), dtype=dtype).transpose(1, 2)


def _unpack(got: Dispatched, handle: LowLatencyHandle, rows: Tensor, scales: Tensor | None) -> None:
    """Puts the rows of an expert, which come one after another, into its slots."""
    counts = torch.tensor(got.num_tokens_per_expert, dtype=torch.int64)
    expert = torch.repeat_interleave(counts)
    slot = torch.arange(len(expert)) - (counts.cumsum(0) - counts)[expert]
    place = expert.to(rows.device), slot.to(rows.device)
    handle.received = Received(got.handle, *place)
    source, target = got.x, rows
    if rows.dtype == torch.float8_e4m3fn:  # few operations know it
        source, target = source.view(torch.uint8), target.view(torch.uint8)
    target[place] = source
    if scales is not None:
        scales[place] = packed_exponents(got.scales) if scales.dtype == torch.int32 else got.scales


def _now_or_later(receive: Hook, is_later: bool) -> Hook | None:
    if is_later:
        return receive
    receive()
    return None
