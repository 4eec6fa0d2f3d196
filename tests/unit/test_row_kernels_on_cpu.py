"""Dispatch and combine of the throughput regime, their kernels compiled for this CPU: all ranks against the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from engines_on_cpu import World, without_cuda
from kernels_on_cpu import CpuKernels
from torch import Tensor

from commlib import reference
from commlib.errors import ConfigError
from commlib.executor import CombineCall, DispatchCall
from commlib.handle import Dispatched
from commlib.testing.payloads import identity_payload, random_payload
from commlib.testing.workloads import Workload, make_workload

__all__ = ["without_cuda"]

pytestmark = pytest.mark.usefixtures("without_cuda")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    return CpuKernels(tmp_path_factory.mktemp("kernels"))


def bits(actual: Any, expected: Tensor | None, what: str) -> None:
    if expected is None:
        assert actual is None, what
        return
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)), what


class Scene:
    """One dispatch on all ranks, and what the oracle says of it."""

    def __init__(
        self, world: World, work: Workload, xs: list[Tensor], layout: str, alignment: int, fp8: str | None
    ) -> None:
        self.world, self.work, self.xs, self.layout = world, work, xs, layout
        self.options = {"layout": layout, "expert_alignment": alignment, "fp8": fp8}
        self.expected = reference.dispatch(
            xs, work.topk_idx, work.topk_weights, work.num_experts, layout=layout, expert_alignment=alignment, fp8=fp8
        )

    def call(self, rank: int, **changes: Any) -> DispatchCall:
        routing = {"topk_idx": self.work.topk_idx[rank], "topk_weights": self.work.topk_weights[rank]}
        return DispatchCall(x=self.xs[rank], **{**routing, **self.options, **changes})

    def dispatch(self, **changes: Any) -> list[Dispatched]:
        results = self.world.each(lambda engine, rank: engine.dispatch(self.call(rank, **changes)))
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results

    def check(self, results: list[Dispatched], *, is_by_handle: bool = False) -> None:
        for rank, (got, want) in enumerate(zip(results, self.expected, strict=True)):
            count, what = len(want.source), f"rank {rank} {self.layout} {self.options}"
            assert list(got.num_tokens_per_expert) == want.num_tokens_per_expert, what
            bits(got.x[:count], want.x, what)
            bits(None if got.scales is None else got.scales[:count], want.scales, what)
            for name in ("row_weights", "topk_idx", "topk_weights"):
                have = getattr(got, name)
                bits(have if have is None else have[:count], None if is_by_handle else getattr(want, name), what)

    def check_combine(
        self, results: list[Dispatched], dtype: torch.dtype, *, is_weighted: bool, has_grads: bool
    ) -> None:
        """Made-up rows of experts; padding holds NaNs that must not be read."""
        ys, weights, grads = [], [], []
        for rank, want in enumerate(self.expected):
            rng = np.random.default_rng([rank, 77])
            y = random_payload(rank, len(want.source), self.xs[0].shape[1], dtype, 5)
            y[want.source[:, 0] < 0] = torch.nan
            ys.append(y)
            weights.append(torch.from_numpy(rng.uniform(-1, 1, len(y)).astype(np.float32)))
            shape = (len(y),) if self.layout == "grouped" else (len(y), self.work.num_topk)
            grads.append(torch.from_numpy(rng.uniform(-1, 1, shape).astype(np.float32)))
        expected = reference.combine(
            ys,
            self.expected,
            self.work.topk_idx,
            self.work.num_experts,
            [0] * len(ys),
            weights=weights if is_weighted else None,
            weight_grads=grads if has_grads else None,
        )
        found = self.world.each(
            lambda engine, rank: engine.combine(
                CombineCall(
                    y=ys[rank],
                    handle=results[rank].handle,
                    weights=weights[rank] if is_weighted else None,
                    weight_grads=grads[rank] if has_grads else None,
                )
            )
        )
        for rank, (got, (out, out_grads)) in enumerate(zip(found, expected, strict=True)):
            if isinstance(got, Exception):
                raise got
            bits(got.x, out, f"rank {rank}: combine {self.layout} {dtype} {is_weighted} {has_grads}")
            bits(got.weight_grads, out_grads, f"rank {rank}: gradients {self.layout}")


SHAPES = [
    # ranks, experts per rank, top-k, tokens, hidden, blocks
    (2, 6, 3, 37, 256, 2),
    (3, 5, 2, 20, 128, 1),
    (1, 4, 1, 5, 8, 2),
    (2, 40, 12, 9, 1024 + 8, 3),
]


@pytest.mark.parametrize("ranks, experts, topk, tokens, hidden, blocks", SHAPES)
def test_there_and_back(
    kernels: CpuKernels, ranks: int, experts: int, topk: int, tokens: int, hidden: int, blocks: int
) -> None:
    """Layouts, payloads, casts, alignments; by handle; combines with and without weights and gradients."""
    shape = {"hidden": hidden, "num_experts": ranks * experts, "num_topk": topk}
    world = World(kernels, ranks, max_tokens=2 * tokens, num_sms=blocks, **shape)
    kinds: list[tuple[torch.dtype, str | None]] = [(torch.bfloat16, None), (torch.float32, None)]
    if hidden % 128 == 0:
        kinds += [(torch.bfloat16, "pow2"), (torch.float32, "fp32")]
    for seed, name in enumerate(("uniform", "masked", "empty_rank", "hot")):
        work = make_workload(
            name, num_ranks=ranks, num_experts=ranks * experts, num_topk=topk, num_tokens=tokens, seed=seed
        )
        layout, alignment = ("grouped", "rows")[seed % 2], (8, 1, 3)[seed % 3]
        dtype, fp8 = kinds[seed % len(kinds)]
        make = (
            random_payload
            if seed
            else lambda rank, count, hidden, dtype, _: identity_payload(rank, count, hidden, dtype)
        )
        xs = [make(rank, count, hidden, dtype, seed) for rank, count in enumerate(work.num_tokens)]
        scene = Scene(world, work, xs, layout, alignment, fp8)
        results = scene.dispatch()
        scene.check(results)
        scene.check_combine(results, torch.bfloat16, is_weighted=True, has_grads=True)
        scene.check_combine(results, torch.float32, is_weighted=False, has_grads=False)
        again = world.each(
            lambda engine, rank, scene=scene, results=results: engine.dispatch(
                DispatchCall(x=scene.xs[rank], handle=results[rank].handle, fp8=scene.options["fp8"])
            )
        )
        scene.check(again, is_by_handle=True)


@pytest.fixture
def small(kernels: CpuKernels) -> Scene:
    world = World(kernels, 2, hidden=128, num_experts=12, num_topk=3, max_tokens=40, num_sms=2)
    work = make_workload("uniform", num_ranks=2, num_experts=12, num_topk=3, num_tokens=20, seed=1)
    xs = [random_payload(rank, count, 128, torch.bfloat16, 1) for rank, count in enumerate(work.num_tokens)]
    return Scene(world, work, xs, "grouped", 1, None)


def test_fixed_capacity(small: Scene) -> None:
    """Sizes that no host learns; one row too few on one rank is too few on all."""
    most = max(len(want.source) for want in small.expected)
    results = small.dispatch(capacity=most + 3)
    for got, want in zip(results, small.expected, strict=True):
        count = len(want.source)
        assert got.num_tokens_per_expert.tolist() == want.num_tokens_per_expert
        bits(got.x[:count], want.x, "capacity")
        assert bool((got.row_weights[count:] == 0).all())
    over = small.dispatch(capacity=most - 1)
    for engine, got in zip(small.world.engines, over, strict=True):
        assert int(got.num_tokens_per_expert.sum()) == 0 and int(engine.overflowed()) == 1
    outs = small.world.each(
        lambda engine, rank: engine.combine(CombineCall(y=torch.zeros_like(over[rank].x), handle=over[rank].handle))
    )
    assert all(bool(out.x.isnan().all()) for out in outs)


@pytest.mark.parametrize(
    "what, message",
    [
        ("expert", "expert id 99 at token 5, slot 1 on rank 1"),
        ("twice", "occurs twice at token 7, slot"),
        ("weight", "weight inf at token 19, slot 0 on rank 1"),
        ("dtype", "x has dtype float64"),
        ("alignment", "expert_alignment=4"),
    ],
)
def test_refusals_are_everybody_s(small: Scene, what: str, message: str) -> None:
    """All ranks raise the same; the next operation is as if nothing had been."""

    def spoilt(rank: int) -> DispatchCall:
        call = small.call(rank)
        if rank != 1:
            return call
        idx, weights = call.topk_idx.clone(), call.topk_weights.clone()
        if what == "expert":
            idx[5, 1] = 99
        elif what == "twice":
            idx[7, 2] = idx[7, 0]
        elif what == "weight":
            weights[19, 0] = torch.inf
        changes: dict[str, Any] = {"topk_idx": idx, "topk_weights": weights}
        if what == "dtype":
            changes["x"] = call.x.double()
        if what == "alignment":
            changes["expert_alignment"] = 4
        return call._replace(**changes)

    raised = small.world.each(lambda engine, rank: engine.dispatch(spoilt(rank)))
    assert all(isinstance(error, ConfigError) and message in str(error) for error in raised), raised
    small.check(small.dispatch())
