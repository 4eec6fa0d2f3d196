"""What a rank sends, counted in one kernel: `commlib.routing.dispatch_layout` for CUDA tensors."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from commlib.cuda.calls import aligned
from commlib.cuda.driver import Kernel
from commlib.cuda.params import LayoutCall
from commlib.cuda.units import launch_on, load_on, zero_on

__all__ = ["MAX_COUNTERS", "MAX_RANKS", "count_layout", "load_layout"]

MAX_RANKS = 64  # bits of a word
MAX_COUNTERS = 8192  # experts and ranks, in the memory that a block shares
_THREADS, _MOST_BLOCKS = 256, 32


@cache
def load_layout(device_index: int) -> Kernel:
    """The kernel on a device; see `commlib.cuda.gate.load_gate`."""
    return load_on(device_index, {"dispatch_layout": {"dispatch_layout": 4 * MAX_COUNTERS}})["dispatch_layout"]


def count_layout(topk_idx: Tensor, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """`commlib.routing.dispatch_layout` of int64 [T, K] on the current stream; `MAX_RANKS`, `MAX_COUNTERS` hold."""
    device, idx = topk_idx.device, aligned(topk_idx)
    num_tokens, num_topk = idx.shape
    counters = torch.empty(num_ranks + num_experts, dtype=torch.int32, device=device)
    per_rank, per_expert = torch.split(counters, [num_ranks, num_experts])
    in_rank = torch.empty(num_tokens, num_ranks, dtype=torch.bool, device=device)
    zero_on(device.index, counters)
    if num_tokens:
        call = LayoutCall(
            topk_idx=idx.data_ptr(),
            tokens_per_rank=per_rank.data_ptr(),
            tokens_per_expert=per_expert.data_ptr(),
            is_token_in_rank=in_rank.data_ptr(),
            num_tokens=num_tokens,
            num_topk=num_topk,
            num_experts=num_experts,
            num_ranks=num_ranks,
        )
        blocks = min(_MOST_BLOCKS, -(-num_tokens // _THREADS))
        launch_on(device.index, load_layout(device.index), blocks, _THREADS, 4 * (num_ranks + num_experts), call)
    return per_rank, per_expert, in_rank
