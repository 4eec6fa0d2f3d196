"""`HybridEPBuffer`: the interface of DeepEP's hybrid-ep branch, with dense routing maps and rows by expert."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from commlib import bootstrap
from commlib.compat.deep_ep.routing_map import Lines, indices_to_map, most_experts, to_lines
from commlib.compat.deep_ep.rows import copied, resized, sent_back
from commlib.compat.deep_ep.runtimes import BufferBase
from commlib.compat.deep_ep.settings import DEFAULT_NUM_SMS, not_covered
from commlib.config import MAX_TOPK
from commlib.errors import ConfigError
from commlib.handle import Handle
from commlib.layout import Layout, align_up
from commlib.runtime import Runtime

__all__ = ["HybridEPBuffer", "HybridHandle", "indices_to_map"]

_NO_PERMUTE = "experts want rows by expert: use dispatch_with_permute and combine_with_unpermute"
_CONNECT_TIMEOUT_S = 60.0


class HybridHandle(NamedTuple):
    """Routing of one dispatch. Needs no buffer. The overflow flag comes last, where clients look for it.

    Attributes:
        num_rows: rows given to the client.
        tokens_per_expert: int64 [local experts], padded.
        overflow_flag: int32 [1], not 0 if rows did not fit into `num_permuted_tokens`.
    """

    runtime: Runtime
    inner: Handle
    lines: Lines
    num_rows: int
    tokens_per_expert: Tensor
    overflow_flag: Tensor


class HybridEPBuffer(BufferBase):
    """Dispatch and combine with permutation, for torch tensors of any device that commlib serves.

    Construction communicates nothing; the first dispatch opens a Runtime (see `runtimes`). Ranks may send different
    numbers of tokens.

    Args:
        group: torch ProcessGroup.
        hidden_dim, max_num_of_tokens_per_rank, num_local_experts, use_fp8: shown in `configurer.buffer_config`, not
            binding.
        num_sms_dispatch_api: SMs that a kernel takes, also of combine.

    The others have no meaning here.
    """

    def __init__(
        self,
        group: Any,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        num_sms_dispatch_api: int | None = None,
        num_sms_combine_api: int | None = None,
        num_sms_preprocessing_api: int | None = None,
        num_blocks_permute: int | None = None,
        num_blocks_unpermute: int | None = None,
        load_cached_kernels: bool = False,
        use_shared_buffer: bool = True,
        enable_custom_allgather: bool = False,
        num_of_hybrid_ep_ranks_per_nvlink_domain: int | None = None,
        use_mnnvl: bool | None = None,
    ) -> None:
        super().__init__(group, explicitly_destroy=False, limits={})
        self.rank, self.group_size = self._rank, self._num_ranks
        self._num_topk: int | None = None
        self._num_sms = num_sms_dispatch_api or DEFAULT_NUM_SMS
        self.configurer = SimpleNamespace(
            buffer_config=SimpleNamespace(
                hidden_dim=hidden_dim,
                max_num_of_tokens_per_rank=max_num_of_tokens_per_rank,
                num_of_experts_per_rank=num_local_experts,
                use_fp8=use_fp8,
            )
        )

    def empty_jit_cache(self) -> None:
        """Nothing to empty."""

    update_template_config = not_covered("update_template_config", "it sets up DeepEP's kernels")
    dispatch = not_covered("HybridEPBuffer.dispatch", _NO_PERMUTE)
    combine = not_covered("HybridEPBuffer.combine", _NO_PERMUTE)

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        num_of_experts: int | None = None,
        use_fp8: bool | None = None,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        scaling_factor: Tensor | None = None,
        num_permuted_tokens: int | Tensor | None = None,
        pad_multiple: int | None = None,
        handle: HybridHandle | None = None,
        non_blocking: bool = False,
        fuse_permute_dispatch: bool = False,
        num_dispatched_tokens: int | None = None,
        use_host_meta: bool | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, HybridHandle]:
        """Sends tokens to the ranks of their experts and returns rows by expert. Collective.

        Args:
            hidden: BF16 or FP32 [num_tokens, hidden]; or E4M3, also as uint8, with `scaling_factor`.
            topk_idx, topk_weights, num_of_experts: routing by indices, [num_tokens, num_topk], -1 = none. Or
            routing_map, probs: routing by a map, bool and FP32 [num_tokens, num_experts].
            scaling_factor: FP32 [num_tokens, hidden / 128] of E4M3 rows; ignored with others.
            num_permuted_tokens: return so many rows; those that do not fit are dropped and flagged.
            pad_multiple: every expert's rows are padded with zeros to a multiple.
            handle: repeat an earlier dispatch.
            non_blocking: needs `num_permuted_tokens`, which is then the limit of the client's memory; counts are on the
                device of `hidden`, else on the CPU.

        Returns:
            (rows by local expert, in ascending (source rank, token) order inside; FP32 [rows] weights or None; FP32
            [rows, hidden / 128] scales or None; int64 [local experts] rows per expert, padded; handle).

        Raises:
            ConfigError: no routing and no handle; `non_blocking` without `num_permuted_tokens`; a limit that
                `pad_multiple` does not divide; and as `Runtime.dispatch`.
        """
        limit = None if num_permuted_tokens is None else int(num_permuted_tokens)
        alignment = pad_multiple or 1
        if non_blocking and (limit is None or limit % alignment):
            raise ConfigError(f"non_blocking needs num_permuted_tokens, a multiple of {alignment}; it is {limit}")
        rows = hidden.view(torch.float8_e4m3fn) if hidden.dtype == torch.uint8 else hidden
        scales = scaling_factor if rows.dtype == torch.float8_e4m3fn else None
        has_probs = handle is None
        if handle is None:
            lines = self._lines(topk_idx, topk_weights, num_of_experts, routing_map, probs)
            has_probs = lines.topk_weights is not None
            runtime = self._runtime(rows, lines.num_experts, lines.topk_idx.shape[1], num_sms=self._num_sms)
            got = runtime.dispatch(
                lines.spread(rows),
                lines.topk_idx,
                lines.topk_weights,
                scales=None if scales is None else lines.spread(scales),
                layout=Layout.GROUPED,
                expert_alignment=alignment,
            )
            handle = _new_handle(runtime, got.handle, lines, limit, alignment, rows if non_blocking else None)
            config = self.configurer.buffer_config
            config.max_num_of_tokens_per_rank = max(config.max_num_of_tokens_per_rank, hidden.shape[0])
        else:
            lines = handle.lines
            spread_scales = None if scales is None else lines.spread(scales)
            got = handle.runtime.dispatch(lines.spread(rows), scales=spread_scales, handle=handle.inner)
        num_rows = handle.num_rows if limit is None else limit
        out = resized(got.x, num_rows)
        return (
            out.view(torch.uint8) if hidden.dtype == torch.uint8 else out,
            copied(got.row_weights, num_rows) if has_probs else None,
            None if got.scales is None else resized(got.scales, num_rows),
            handle.tokens_per_expert,
            handle,
        )

    def combine_with_unpermute(
        self,
        *,
        hidden: Tensor,
        probs: Tensor | None = None,
        handle: HybridHandle | None = None,
        pad_multiple: int | None = None,
        fuse_unpermute_combine: bool = False,
        num_dispatched_tokens: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Sums, for every token, the rows of its experts; unweighted. Collective.

        Args:
            hidden: BF16 or FP32 [rows, hidden], in the order of the dispatch.
            probs: FP32 [rows]: each returns to the entry of the map it belongs to. On all ranks or on none.
            handle: of the dispatch; `pad_multiple` is taken from it.

        Returns:
            ([num_tokens, hidden] in the dtype of `hidden`; FP32 [num_tokens, num_experts], 0 outside of the map, or
            None). Rows that did not fit into `num_permuted_tokens` count as zeros.
        """
        if handle is None:
            raise ConfigError("combine_with_unpermute needs a handle")
        inner, given = handle.inner, handle.num_rows
        grads = None if probs is None else sent_back(probs.float(), given, inner.num_rows)
        out = handle.runtime.combine(sent_back(hidden, given, inner.num_rows), inner, weight_grads=grads)
        dense = None if out.weight_grads is None else handle.lines.to_dense(out.weight_grads)
        return handle.lines.gather(out.x), dense

    def _lines(
        self,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        num_of_experts: int | None,
        routing_map: Tensor | None,
        probs: Tensor | None,
    ) -> Lines:
        if routing_map is not None:
            return to_lines(routing_map, probs, self._agreed_num_topk(routing_map))
        if topk_idx is None or num_of_experts is None:
            raise ConfigError("dispatch_with_permute needs routing_map, or topk_idx and num_of_experts, or handle")
        return Lines(topk_idx.to(torch.int64), topk_weights, None, topk_idx.shape[0], num_of_experts)

    def _agreed_num_topk(self, routing_map: Tensor) -> int:
        """Slots per line: the most experts of a token on any rank in the first call, in which all ranks find out."""
        if self._num_topk is None:
            boot = bootstrap.connect(self.group, timeout_s=_CONNECT_TIMEOUT_S)
            try:
                own = most_experts(routing_map).to_bytes(4, "little")
                told = boot.allgather(own, timeout_s=_CONNECT_TIMEOUT_S)
            finally:
                if boot is not self.group:
                    boot.close()
            most = max(int.from_bytes(each, "little") for each in told)
            self._num_topk = min(max(most, 1), MAX_TOPK)
        return self._num_topk


def _new_handle(
    runtime: Runtime, inner: Handle, lines: Lines, limit: int | None, alignment: int, on_device_of: Tensor | None
) -> HybridHandle:
    """Handle of a fresh dispatch; with a limit, experts whose rows lie behind it lose them."""
    counts = [align_up(count, alignment) for count in inner.num_tokens_per_expert]
    num_rows = inner.num_rows if limit is None else limit
    start, kept = 0, []
    for count in counts:
        kept.append(min(count, max(num_rows - start, 0)))
        start += count
    tokens_per_expert = torch.tensor(kept, dtype=torch.int64)
    if on_device_of is not None:
        tokens_per_expert = tokens_per_expert.to(on_device_of.device)
    device = lines.topk_idx.device
    overflow = torch.full((1,), int(inner.num_rows > num_rows), dtype=torch.int32, device=device)
    return HybridHandle(runtime, inner, lines, num_rows, tokens_per_expert, overflow)
