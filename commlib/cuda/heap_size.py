"""What the heap of a rank starts with, unless the config says."""

from __future__ import annotations

import math

from commlib.config import RuntimeConfig
from commlib.cuda.decode import most_decode_rows
from commlib.cuda.landing import dispatch_landing
from commlib.launch_plan import combine_slot_bytes
from commlib.layout import align_up, record_bytes

__all__ = ["default_heap_bytes"]


def default_heap_bytes(config: RuntimeConfig, num_ranks: int, num_nodes: int = 1) -> int:
    """Room for one BF16 dispatch of uniform choices, two standard deviations more, and its combine; it grows as needed,
    but not for calls with a capacity or in a CUDA graph: for a larger capacity, or FP32, give `arena_bytes`.

    Between nodes also for two dispatches of the latency regime with the config's alignment.
    """
    topk, alignment = config.num_topk, config.expert_alignment
    experts, choices = config.num_experts // num_ranks, config.max_tokens * topk
    # Half a step of padding an expert, or all that is missing; an expert's padding deviates by half a step.
    num_rows = max(experts * alignment, choices + experts * (alignment // 2))
    num_rows += math.isqrt(experts * alignment**2) + 2 * math.isqrt(choices)
    dispatched = _dispatch_bytes(config, num_rows, config.max_tokens * min(topk, num_ranks))
    slot = combine_slot_bytes(config.hidden, topk, 2, has_grads=True)
    landing = config.max_tokens * min(topk, num_ranks - 1) * slot
    if num_nodes > 1:  # of tokens for which this rank is the rail as well
        landing = 2 * config.max_tokens * min(topk, num_ranks) * (2 * config.hidden + record_bytes(topk))
    decode = 0
    if num_nodes > 1 and config.decode_tokens is not None:
        most = most_decode_rows(config, num_ranks, config.expert_alignment)
        decode = 2 * _dispatch_bytes(config, most, num_ranks * config.max_tokens)
    return align_up(dispatched + landing + decode, 1 << 20)


def _dispatch_bytes(config: RuntimeConfig, num_rows: int, num_records: int) -> int:
    """A grant, BF16."""
    landing = dispatch_landing(
        num_rows, num_records, row_bytes=2 * config.hidden, scales_bytes=0, num_topk=config.num_topk, is_rows=False,
        is_fresh=True,
    )  # fmt: skip
    return int(landing.total_bytes)
