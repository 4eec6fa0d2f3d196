"""The stand-in for grouped_gemm that the benchmark gives Megatron's experts."""

from __future__ import annotations

import pytest
import torch
from compat.grouped_experts import gmm


@pytest.mark.parametrize("trans_b", [False, True])
def test_like_a_loop(trans_b: bool) -> None:
    sizes, generator = torch.tensor([3, 0, 8, 5]), torch.Generator().manual_seed(0)
    # Whole numbers: sums are exact in any order.
    shapes = ((16, 8), (4, 24, 8) if trans_b else (4, 8, 24), (16, 24))
    a, b, grad = (torch.randint(-3, 4, shape, generator=generator).float() for shape in shapes)
    a.requires_grad_()
    b.requires_grad_()
    out = gmm(a, b, sizes, trans_b=trans_b)
    found = [out, *torch.autograd.grad(out, [a, b], grad)]
    weights = b.transpose(1, 2) if trans_b else b
    loop = torch.cat([rows @ weight for rows, weight in zip(a.split(sizes.tolist()), weights, strict=True)])
    for ours, theirs in zip(found, [loop, *torch.autograd.grad(loop, [a, b], grad)], strict=True):
        assert torch.equal(ours, theirs)
