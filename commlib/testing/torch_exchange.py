"""Dispatch and combine the plain way: torch permutations around `torch.distributed.all_to_all_single`.

What trainers do without a library of their own (the token dispatcher "alltoall" of Megatron-Core goes the same way): a
copy of a row travels for each expert that it goes to. Differentiable, on any backend with all-to-all: second opinion
of tests and baseline of benchmarks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from commlib.errors import ConfigError

__all__ = ["TorchDispatched", "TorchExchange", "TorchHandle"]


class TorchHandle:
    """The routing of one dispatch, with the names of `commlib.handle.Handle`.

    Attributes:
        num_rows: rows received, padding included.
    """

    def __init__(
        self, pairs: Tensor, num_tokens: int, sent: list[int], received: list[int], place: Tensor, num_rows: int
    ) -> None:
        self._pairs = pairs  # [sent rows] token
        self._num_tokens = num_tokens
        self._sent, self._received = sent, received  # [rank] rows
        self._place = place  # [received rows] row of the result
        self.num_rows = num_rows
        self._load: list[int] = []

    def load(self) -> list[int]:
        """Tokens per expert over all ranks."""
        return self._load


class TorchDispatched(NamedTuple):
    """The fields of `commlib.handle.Dispatched` that layout "grouped" has."""

    x: Tensor
    row_weights: Tensor
    num_tokens_per_expert: tuple[int, ...]
    handle: TorchHandle


class TorchExchange:
    """Experts spread evenly over the ranks of a group, in order.

    Args:
        group: of torch.distributed; None: all ranks.
        num_experts: over all ranks, a multiple of their number.
        expert_alignment: every local expert's rows are padded to a multiple of this.

    Raises:
        ConfigError: the experts do not spread evenly.
    """

    def __init__(self, group: Any, num_experts: int, expert_alignment: int = 1) -> None:
        self.num_ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        if num_experts % self.num_ranks:
            raise ConfigError(f"num_experts={num_experts} is not divisible by num_ranks={self.num_ranks}")
        self._group, self._alignment = group, expert_alignment
        self._num_experts, self._per_rank = num_experts, num_experts // self.num_ranks

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> TorchDispatched:
        """Rows by local expert, source rank, token: the order of commlib's layout "grouped".

        Args:
            x: [tokens, hidden].
            topk_idx: int64 [tokens, topk], -1 = no expert.
            topk_weights: FP32 [tokens, topk].
        """
        token, slot = (topk_idx >= 0).nonzero(as_tuple=True)
        order = topk_idx[token, slot].sort(stable=True).indices
        token, slot = token[order], slot[order]
        counts = torch.bincount(topk_idx[token, slot], minlength=self._num_experts)  # [expert] own rows
        all_counts = counts.new_empty(self.num_ranks, self._num_experts)
        dist.all_gather(list(all_counts.unbind()), counts, group=self._group)
        table = all_counts.tolist()  # the host has to know how much to ask for
        mine = slice(self.rank * self._per_rank, (self.rank + 1) * self._per_rank)
        sent = [sum(table[self.rank][r * self._per_rank : (r + 1) * self._per_rank]) for r in range(self.num_ranks)]
        received = [sum(row[mine]) for row in table]

        here = all_counts[:, mine]  # [source, local expert]
        per_expert = here.sum(dim=0)
        padded = (per_expert + self._alignment - 1) // self._alignment * self._alignment
        place = self._places(here, padded.cumsum(0) - padded)
        per_expert_list, num_rows = per_expert.tolist(), int(padded.sum())
        handle = TorchHandle(token, len(x), sent, received, place, num_rows)
        handle._load = all_counts.sum(dim=0).tolist()
        rows = _AllToAll.apply(x[token], sent, received, self._group)  # type: ignore[no-untyped-call]
        weights = _AllToAll.apply(topk_weights[token, slot], sent, received, self._group)  # type: ignore[no-untyped-call]
        return TorchDispatched(
            rows.new_zeros(num_rows, x.shape[1]).index_copy(0, place, rows),
            weights.new_zeros(num_rows).index_copy(0, place, weights),
            tuple(per_expert_list),
            handle,
        )

    def combine(self, y: Tensor, handle: TorchHandle) -> Tensor:
        """[tokens, hidden]: the sum of each token's rows of `y` [num_rows, hidden], in FP32, rounded to its dtype."""
        back = _AllToAll.apply(y[handle._place], handle._received, handle._sent, self._group)  # type: ignore[no-untyped-call]
        total = torch.zeros(handle._num_tokens, y.shape[1], dtype=torch.float32, device=y.device)
        return total.index_add(0, handle._pairs, back.float()).to(y.dtype)

    @staticmethod
    def _places(here: Tensor, begins: Tensor) -> Tensor:
        """Where each received row goes. Received: by source, local expert, token; here [source, local expert]."""
        before = here.cumsum(0) - here + begins  # [source, local expert] first row of the result
        first = before.flatten().repeat_interleave(here.flatten())
        starts = (here.flatten().cumsum(0) - here.flatten()).repeat_interleave(here.flatten())
        return first + torch.arange(len(first), device=here.device) - starts


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
