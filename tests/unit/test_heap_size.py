"""What the heap of a GPU's Runtime starts with, unless it is told."""

from __future__ import annotations

import pytest
import torch

from commlib.config import RuntimeConfig
from commlib.cuda.heap_size import default_heap_bytes
from commlib.cuda.landing import dispatch_landing
from commlib.cuda.memory import ALIGNMENT, Regions
from commlib.launch_plan import combine_slot_bytes
from commlib.layout import align_up, record_bytes

HIDDEN, EXPERTS, TOPK, STEP = 7168, 256, 8, 128


def config_of(num_tokens: int) -> RuntimeConfig:
    return RuntimeConfig(
        hidden=HIDDEN, num_experts=EXPERTS, num_topk=TOPK, max_tokens=num_tokens, expert_alignment=STEP, num_sms=16
    )


@pytest.mark.parametrize("num_tokens", [64, 128, 512, 4096])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_a_sampled_dispatch_and_its_combine_fit(num_ranks: int, num_tokens: int) -> None:
    """Uniform choices, BF16, gradients of the weights too; the rank that receives most."""
    generator = torch.Generator().manual_seed(num_ranks * num_tokens)
    choices = torch.rand(num_ranks * num_tokens, EXPERTS, generator=generator).topk(TOPK, dim=1).indices
    per_rank = EXPERTS // num_ranks
    load = choices.flatten().bincount(minlength=EXPERTS).view(num_ranks, per_rank)
    goes_to = torch.zeros(num_ranks * num_tokens, num_ranks, dtype=torch.bool).scatter_(1, choices // per_rank, True)
    counts = goes_to.view(num_ranks, num_tokens, num_ranks).sum(dim=1).tolist()  # [source][rank]
    slot = combine_slot_bytes(HIDDEN, TOPK, 2, has_grads=True)
    for rank in range(num_ranks):
        rows = sum(align_up(count, STEP) for count in load[rank].tolist())
        records = sum(row[rank] for row in counts)
        landing = dispatch_landing(
            rows, records, row_bytes=2 * HIDDEN, scales_bytes=0, num_topk=TOPK, is_rows=False, is_fresh=True
        )
        partials = sum(align_up(count * slot, ALIGNMENT) for r, count in enumerate(counts[rank]) if r != rank)
        assert landing.total_bytes + partials <= default_heap_bytes(config_of(num_tokens), num_ranks)


def test_no_more_than_other_libraries_register() -> None:
    """4 ranks of 4096 tokens: DeepEP V2 has 226 MiB, and outputs besides."""
    config, experts = config_of(4096), EXPERTS // 4
    rows = experts * (4096 * TOPK * 4 // EXPERTS + STEP // 2)  # half a step of padding an expert
    outputs = rows * (2 * HIDDEN + 4) + 4096 * 4 * record_bytes(TOPK)
    ours = default_heap_bytes(config, 4) + Regions(config, 4, 1, 4).total_bytes
    assert ours <= outputs + (226 << 20)
