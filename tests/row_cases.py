"""Calls of dispatch and combine on CPU tensors, and what the oracle says of each rank's results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from commlib import reference
from commlib.executor import CombineCall, DispatchCall
from commlib.handle import Combined, Dispatched
from commlib.testing.payloads import random_payload
from commlib.testing.workloads import Workload

__all__ = ["Case", "CombineInputs", "assert_bits", "assert_combined", "assert_dispatched", "combine_inputs"]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_bits(actual: Any, expected: Tensor | None, what: str) -> None:
    """Same dtype, shape and bits, on whatever device; NaNs and the signs of zeros count."""
    if expected is None:
        assert actual is None, f"{what}: {type(actual).__name__}, expected None"
        return
    assert isinstance(actual, Tensor), f"{what}: {type(actual).__name__}, expected a tensor"
    actual = actual.cpu()
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), (
        f"{what}: {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
    )
    bits = _BITS[actual.element_size()]
    differs = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    if bool(differs.any()):
        place = tuple(int(i) for i in torch.nonzero(differs)[0])
        values = f"{actual.float()[place]!s}, expected {expected.float()[place]!s}"
        raise AssertionError(f"{what}: {int(differs.sum())} of {differs.numel()} differ, first at {place}: {values}")


def assert_dispatched(
    got: Dispatched, expected: reference.ReferenceDispatch, what: str, *, is_by_handle: bool = False
) -> None:
    """Everything that a dispatch returns against the oracle."""
    assert list(got.num_tokens_per_expert) == expected.num_tokens_per_expert, what
    assert got.handle.num_rows == len(expected.source), what
    assert_bits(got.x, expected.x, f"{what}: x")
    assert_bits(got.scales, expected.scales, f"{what}: scales")
    for name in ("row_weights", "topk_idx", "topk_weights"):
        assert_bits(getattr(got, name), None if is_by_handle else getattr(expected, name), f"{what}: {name}")


class CombineInputs(NamedTuple):
    """Of every rank: rows of experts, their weights, gradients of the routing weights."""

    ys: list[Tensor]
    weights: list[Tensor]
    grads: list[Tensor]


def combine_inputs(
    expected: Sequence[reference.ReferenceDispatch], layout: str, num_topk: int, dtype: torch.dtype, seed: int
) -> CombineInputs:
    """Made up for what the ranks have received; padding holds NaNs that must not be read."""
    inputs = CombineInputs([], [], [])
    for rank, received in enumerate(expected):
        rng = np.random.default_rng([seed, rank, 77])
        y = random_payload(rank, len(received.source), received.x.shape[1], dtype, seed)
        y[received.source[:, 0] < 0] = torch.nan
        inputs.ys.append(y)
        inputs.weights.append(torch.from_numpy(rng.uniform(-1, 1, len(y)).astype(np.float32)))
        shape = (len(y),) if layout == "grouped" else (len(y), num_topk)
        inputs.grads.append(torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32)))
    return inputs


def assert_combined(
    got: Combined,
    rank: int,
    inputs: CombineInputs,
    expected: Sequence[reference.ReferenceDispatch],
    work: Workload,
    node_of_rank: Sequence[int],
    what: str,
    *,
    is_weighted: bool,
    has_grads: bool,
) -> None:
    """What a rank got of a combine of `inputs`, of which weights and gradients may have been left out."""
    out, out_grads = reference.combine(
        inputs.ys,
        expected,
        work.topk_idx,
        work.num_experts,
        node_of_rank,
        weights=inputs.weights if is_weighted else None,
        weight_grads=inputs.grads if has_grads else None,
    )[rank]
    assert_bits(got.x, out, f"{what}: x")
    assert_bits(got.weight_grads, out_grads, f"{what}: weight_grads")


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
        what = f"rank {rank}: {self.work.name} {self.options} by handle {is_by_handle}"
        assert_dispatched(got, self.expected[rank], what, is_by_handle=is_by_handle)

    def _inputs(self, dtype: torch.dtype) -> CombineInputs:
        return combine_inputs(self.expected, self.layout, self.work.num_topk, dtype, 5)

    def combine_call(
        self, rank: int, got: Dispatched, dtype: torch.dtype, *, is_weighted: bool, has_grads: bool
    ) -> CombineCall:
        ys, weights, grads = self._inputs(dtype)
        return CombineCall(
            y=ys[rank],
            handle=got.handle,
            weights=weights[rank] if is_weighted else None,
            weight_grads=grads[rank] if has_grads else None,
        )

    def check_combined(
        self, rank: int, got: Combined, dtype: torch.dtype, *, is_weighted: bool, has_grads: bool
    ) -> None:
        assert_combined(
            got,
            rank,
            self._inputs(dtype),
            self.expected,
            self.work,
            self.nodes,
            f"rank {rank}: combine {self.work.name} {self.options} {dtype} {is_weighted=} {has_grads=}",
            is_weighted=is_weighted,
            has_grads=has_grads,
        )
