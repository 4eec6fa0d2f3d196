"""Calls of dispatch and combine on CPU tensors, and what the oracle says of each rank's results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from commlib import reference
from commlib.executor import CombineCall, DispatchCall
from commlib.handle import Combined, Dispatched
from commlib.testing.payloads import random_payload
from commlib.testing.workloads import Workload

__all__ = ["Case", "check_bits"]


def check_bits(actual: Any, expected: Tensor | None, what: str) -> None:
    """Same dtype, shape and bits; NaNs and the signs of zeros count."""
    if expected is None:
        assert actual is None, what
        return
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)), what


class Case:
    """One dispatch of all ranks and its combines.

    Args:
        work: choices.
        xs: rows of each rank.
        node_of_rank: the order of sums follows nodes.
        layout, alignment, fp8: of the dispatch.
    """

    def __init__(
        self,
        work: Workload,
        xs: list[Tensor],
        node_of_rank: Sequence[int],
        *,
        layout: str = "grouped",
        alignment: int = 1,
        fp8: str | None = None,
    ) -> None:
        self.work, self.xs, self.nodes, self.layout, self.fp8 = work, xs, list(node_of_rank), layout, fp8
        self.options: dict[str, Any] = {"layout": layout, "expert_alignment": alignment, "fp8": fp8}
        self.expected = reference.dispatch(
            xs, work.topk_idx, work.topk_weights, work.num_experts, layout=layout, expert_alignment=alignment, fp8=fp8
        )

    def call(self, rank: int, **changes: Any) -> DispatchCall:
        routing = {"topk_idx": self.work.topk_idx[rank], "topk_weights": self.work.topk_weights[rank]}
        return DispatchCall(x=self.xs[rank], **{**routing, **self.options, **changes})

    def call_again(self, rank: int, got: Dispatched) -> DispatchCall:
        return DispatchCall(x=self.xs[rank], handle=got.handle, fp8=self.fp8)

    def check(self, rank: int, got: Dispatched, *, is_by_handle: bool = False) -> None:
        want, what = self.expected[rank], f"rank {rank}: {self.work.name} {self.options} by handle {is_by_handle}"
        assert list(got.num_tokens_per_expert) == want.num_tokens_per_expert, what
        check_bits(got.x, want.x, what)
        check_bits(got.scales, want.scales, what)
        for name in ("row_weights", "topk_idx", "topk_weights"):
            check_bits(getattr(got, name), None if is_by_handle else getattr(want, name), f"{what}: {name}")

    def _payload(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Rows of experts, weights and gradients; padding holds NaNs that must not be read."""
        ys, weights, grads = [], [], []
        for rank, want in enumerate(self.expected):
            rng = np.random.default_rng([rank, 77])
            y = random_payload(rank, len(want.source), self.xs[0].shape[1], dtype, 5)
            y[want.source[:, 0] < 0] = torch.nan
            ys.append(y)
            weights.append(torch.from_numpy(rng.uniform(-1, 1, len(y)).astype(np.float32)))
            shape = (len(y),) if self.layout == "grouped" else (len(y), self.work.num_topk)
            grads.append(torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32)))
        return ys, weights, grads

    def combine_call(
        self, rank: int, got: Dispatched, dtype: torch.dtype, *, is_weighted: bool, has_grads: bool
    ) -> CombineCall:
        ys, weights, grads = self._payload(dtype)
        return CombineCall(
            y=ys[rank],
            handle=got.handle,
            weights=weights[rank] if is_weighted else None,
            weight_grads=grads[rank] if has_grads else None,
        )

    def check_combined(
        self, rank: int, got: Combined, dtype: torch.dtype, *, is_weighted: bool, has_grads: bool
    ) -> None:
        ys, weights, grads = self._payload(dtype)
        out, out_grads = reference.combine(
            ys,
            self.expected,
            self.work.topk_idx,
            self.work.num_experts,
            self.nodes,
            weights=weights if is_weighted else None,
            weight_grads=grads if has_grads else None,
        )[rank]
        what = f"rank {rank}: combine {self.work.name} {self.options} {dtype} {is_weighted=} {has_grads=}"
        check_bits(got.x, out, what)
        check_bits(got.weight_grads, out_grads, what)
