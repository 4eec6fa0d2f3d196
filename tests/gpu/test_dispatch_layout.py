"""Counts of what a rank sends, by the kernel and by torch operations."""

from __future__ import annotations

import pytest
import torch

from commlib import ops, routing
from commlib.errors import ConfigError

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("num_tokens", "num_topk", "num_experts", "num_ranks"),
    [
        (4096, 8, 256, 4),
        (1, 1, 1, 1),
        (0, 2, 8, 4),
        (777, 3, 64, 64),
        (100, 2, 130, 65),
        (50, 6, 8190, 2),
        (9000, 8, 8, 8),
    ],
)
def test_like_torch(num_tokens: int, num_topk: int, num_experts: int, num_ranks: int) -> None:
    """65 ranks and 8190 + 2 counters are beyond and at the kernel's limits."""
    torch.manual_seed(num_tokens)
    idx = torch.rand(num_tokens, num_experts).argsort(dim=1)[:, :num_topk]
    idx = idx.masked_fill(torch.rand(num_tokens, num_topk) < 0.1, -1)
    expected = routing.dispatch_layout(idx, num_experts, num_ranks)
    for given in (idx.cuda(), idx.cuda().repeat(1, 2)[:, :num_topk]):  # the second is not contiguous
        for ours, theirs in zip(ops.dispatch_layout(given, num_experts, num_ranks), expected, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs)


def test_uneven_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_experts=6 is not divisible by num_ranks=4"):
        ops.dispatch_layout(torch.zeros(1, 1, dtype=torch.int64, device="cuda"), 6, 4)
