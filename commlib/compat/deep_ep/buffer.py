"""`Buffer`: DeepEP's first interface, normal mode. Low-latency mode is in `low_latency`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from commlib import ops
from commlib.compat.deep_ep.low_latency import LowLatencyBuffer
from commlib.compat.deep_ep.rows import (
    Input,
    aligned_counts,
    check_room,
    copied,
    plus_bias,
    received,
    sent_back,
    split_scales,
)
from commlib.compat.deep_ep.settings import Config, not_covered
from commlib.compat.deep_ep.utils.event import EventHandle, EventOverlap, event_after, wait_for
from commlib.errors import ConfigError
from commlib.handle import Handle
from commlib.layout import Layout
from commlib.runtime import Runtime

__all__ = ["Buffer", "NormalHandle"]


class NormalHandle(NamedTuple):
    """Routing of one dispatch. Needs no buffer: it brings its Runtime. `num_rows`: rows given to the client."""

    runtime: Runtime
    inner: Handle
    num_rows: int


class Buffer(LowLatencyBuffer):
    """Dispatch and combine with DeepEP's first interface, for torch tensors of any device that commlib serves.

    Construction communicates nothing; the first dispatch of a shape opens a Runtime (see `runtimes`).

    Args:
        group: torch ProcessGroup. None: `comm`.
        num_nvl_bytes: initial room of a Runtime's arena, which grows on demand; 0 = from the shape.
        num_rdma_bytes: kept as an attribute.
        low_latency_mode: kept as an attribute; both modes work in either case.
        explicitly_destroy: whether `destroy` will be called.
        enable_shrink: kept as an attribute; masks work in either case.
        comm: mpi4py communicator, if `group` is None.

    The others have no meaning here. Raises ValueError without group and comm.
    """

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        use_fabric: bool = False,
    ) -> None:
        if group is None and comm is None:
            raise ValueError("Buffer needs a group or a comm")
        super().__init__(
            comm if group is None else group,
            explicitly_destroy=explicitly_destroy,
            limits={"arena_bytes": num_nvl_bytes} if num_nvl_bytes > 0 else {},
        )
        self.rank, self.group_size = self._rank, self._num_ranks
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.enable_shrink = low_latency_mode, enable_shrink

    # ---- settings

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True: FP8 rows are carried."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """SMs that a kernel takes, in Runtimes that are opened from now on."""
        if new_num_sms % 2:
            raise ValueError(f"num_sms={new_num_sms} is odd; DeepEP's rule is an even number")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The same for any number of ranks."""
        return Config(num_sms=Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The same for any number of ranks."""
        return Config(num_sms=Buffer.num_sms)

    @staticmethod
    def capture() -> EventOverlap:
        """An event at this point of the current stream."""
        return EventOverlap(EventHandle())

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The current stream: operations chain on it."""
        return torch.cuda.current_stream()

    get_local_buffer_tensor = not_covered("get_local_buffer_tensor", "results do not lie in one raw buffer")

    # ---- normal mode

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Counts of what this rank sends. Local; the Runtime does not need them, clients read them.

        Args:
            topk_idx: int64 [num_tokens, num_topk], -1 = none.
            num_experts: experts over all ranks.
            previous_event: waited for first.
            async_finish: return an event.
            allocate_on_comm_stream: without meaning.

        Returns:
            (int32 [ranks] tokens per rank, None, int32 [num_experts] tokens per expert, bool [num_tokens, ranks]
            whether a token goes to a rank, event). The second, tokens per node, is None on any number of nodes.
        """
        wait_for(previous_event)
        per_rank, per_expert, in_rank = ops.dispatch_layout(topk_idx, num_experts, self.group_size)
        return per_rank, None, per_expert, in_rank, event_after(async_finish)

    def dispatch(
        self,
        x: Input,
        handle: NormalHandle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Input, Tensor | None, Tensor | None, list[int] | None, NormalHandle | None, EventOverlap]:
        """Sends every token once to each rank with an expert of it. Collective.

        Args:
            x: BF16 or FP32 [num_tokens, hidden], or E4M3 in a tuple with FP32 scales [num_tokens, hidden / 128].
            handle: repeat an earlier dispatch; then only rows and the event are returned.
            num_tokens_per_expert: [num_experts]; of the layout tensors only its length is needed.
            topk_idx: int64 [num_tokens, num_topk], -1 = none.
            topk_weights: FP32 [num_tokens, num_topk].
            expert_alignment: the returned counts (not the rows) are rounded up to a multiple.
            num_worst_tokens: if above 0, return so many rows, the last of them zeros with `topk_idx` -1, and no counts.
                Equal on all ranks.
            previous_event: waited for first.
            async_finish: return an event.

        Returns:
            (rows in the form of `x`, one per (source rank, token), ascending; int64 [rows, num_topk] local expert ids,
            -1 elsewhere; FP32 [rows, num_topk], 0 elsewhere; tokens per local expert; handle; event).

        Raises:
            NotImplementedError: without `topk_idx` and `topk_weights`; scales of another shape.
            ConfigError: fewer worst tokens than arrive on some rank (on all ranks alike); and as `Runtime.dispatch`.
        """
        wait_for(previous_event)
        rows, scales = split_scales(x)
        if handle is not None:
            again = handle.runtime.dispatch(rows, topk_idx, topk_weights, scales=scales, handle=handle.inner)
            recv = received(again.x, again.scales, handle.num_rows)
            return recv, None, None, None, None, event_after(async_finish)
        if topk_idx is None or topk_weights is None:
            raise NotImplementedError("commlib's deep_ep dispatches by topk_idx and topk_weights, not without them")
        if num_tokens_per_expert is None:
            raise ConfigError("dispatch needs num_tokens_per_expert: its length is the number of experts")
        runtime = self._runtime(rows, num_tokens_per_expert.shape[0], topk_idx.shape[1], num_sms=self.num_sms)
        got = runtime.dispatch(rows, topk_idx, topk_weights, scales=scales, layout=Layout.ROWS)
        num_rows = num_worst_tokens or got.handle.num_rows
        if num_worst_tokens:
            check_room(got.handle, num_worst_tokens, f"{num_worst_tokens=}")
        return (
            received(got.x, got.scales, num_rows),
            copied(got.topk_idx, num_rows, fill=-1),
            copied(got.topk_weights, num_rows),
            [] if num_worst_tokens else aligned_counts(got.num_tokens_per_expert, expert_alignment),
            NormalHandle(runtime, got.handle, num_rows),
            event_after(async_finish),
        )

    def combine(
        self,
        x: Tensor,
        handle: NormalHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sums, for every token, the rows of the ranks it went to; unweighted. Collective.

        Args:
            x: BF16 or FP32 [rows, hidden], in the order of the dispatch.
            handle: of the dispatch, of this or another buffer.
            topk_weights: FP32 [rows, num_topk]: each slot's value returns from the one rank that has its expert. On all
                ranks or on none.
            bias: one or two tensors [num_tokens, hidden] to add.
            previous_event: waited for first.
            async_finish: return an event.

        Returns:
            ([num_tokens, hidden] in the dtype of `x`; FP32 [num_tokens, num_topk], 0 where masked, or None; event).
        """
        wait_for(previous_event)
        inner, given = handle.inner, handle.num_rows
        grads = None if topk_weights is None else sent_back(topk_weights, given, inner.num_rows)
        out = handle.runtime.combine(sent_back(x, given, inner.num_rows), inner, weight_grads=grads)
        return plus_bias(out.x, bias), out.weight_grads, event_after(async_finish)

    # DeepEP's own names for the case of several nodes, which dispatch and combine handle as well.
    internode_dispatch = dispatch
    internode_combine = combine

    dispatch_pcie = not_covered("dispatch_pcie", "ranks without NVLink use dispatch")
    combine_pcie = not_covered("combine_pcie", "ranks without NVLink use combine")
