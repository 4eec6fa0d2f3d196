"""What Megatron-Core's GroupedMLP wants of the package grouped_gemm, on torch's grouped product: with experts one after
the other its layer is bound by the host, whoever carries the rows."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gmm", "install"]


def install() -> None:
    """To be called before anything of Megatron is imported."""
    sys.modules["grouped_gemm"] = SimpleNamespace(ops=SimpleNamespace(gmm=gmm))  # type: ignore[assignment]


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """`a[r] @ b[e]` for the rows r of each e: [T, K], [E, K, N] or, with `trans_b`, [E, N, K] -> [T, N].

    `batch_sizes`: int64 [E] on the CPU, their sum is T.
    """
    out: Tensor = _Product.apply(a, b.transpose(1, 2) if trans_b else b, batch_sizes)  # type: ignore[no-untyped-call]
    return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, batch_sizes: Tensor) -> Tensor:
        ends = batch_sizes.cumsum(0).to(torch.int32).to(a.device)
        ctx.save_for_backward(a, b, ends)
        ctx.sizes = batch_sizes.tolist()
        return F.grouped_mm(a, b, offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        a, b, ends = ctx.saved_tensors
        grad_b = torch.empty(b.shape, dtype=b.dtype, device=b.device)
        # One by one: torch's grouped product over rows wants groups of a multiple of 16 bytes.
        for rows, grads, out in zip(a.split(ctx.sizes), grad.split(ctx.sizes), grad_b, strict=True):
            torch.mm(rows.t(), grads, out=out)
        return F.grouped_mm(grad.contiguous(), b.transpose(1, 2), offs=ends), grad_b, None
