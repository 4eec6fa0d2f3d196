"""Dispatch and combine of the throughput regime, their kernels compiled for this CPU: all ranks against the oracle."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import pytest
import torch
from engines_on_cpu import World
from kernels_on_cpu import CpuKernels
from row_cases import Case, assert_bits

from commlib.cuda.params import Workspace
from commlib.errors import CapacityError, ConfigError
from commlib.executor import CombineCall, DispatchCall
from commlib.handle import Dispatched
from commlib.testing.payloads import identity_payload, random_payload
from commlib.testing.workloads import make_workload

pytestmark = pytest.mark.usefixtures("without_cuda")


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
        case = Case(work, xs, [0] * ranks, layout=layout, alignment=alignment, fp8=fp8)
        results = world.all(lambda engine, rank, case=case: engine.dispatch(case.call(rank)))
        for rank, got in enumerate(results):
            case.check(rank, got)
        for options in (
            {"dtype": torch.bfloat16, "is_weighted": True, "has_grads": True},
            {"dtype": torch.float32, "is_weighted": False, "has_grads": False},
        ):
            calls = [case.combine_call(rank, got, **options) for rank, got in enumerate(results)]
            for rank, got in enumerate(world.all(lambda engine, rank, calls=calls: engine.combine(calls[rank]))):
                case.check_combined(rank, got, **options)
        calls = [case.call_again(rank, got) for rank, got in enumerate(results)]
        for rank, got in enumerate(world.all(lambda engine, rank, calls=calls: engine.dispatch(calls[rank]))):
            case.check(rank, got, is_by_handle=True)


@pytest.fixture
def small(kernels: CpuKernels) -> tuple[World, Case]:
    world = World(kernels, 2, hidden=128, num_experts=12, num_topk=3, max_tokens=40, num_sms=2)
    work = make_workload("uniform", num_ranks=2, num_experts=12, num_topk=3, num_tokens=20, seed=1)
    xs = [random_payload(rank, count, 128, torch.bfloat16, 1) for rank, count in enumerate(work.num_tokens)]
    return world, Case(work, xs, [0, 0])


def dispatch(world: World, case: Case, **changes: Any) -> list[Dispatched]:
    return world.all(lambda engine, rank: engine.dispatch(case.call(rank, **changes)))


def test_fixed_capacity(small: tuple[World, Case]) -> None:
    """Sizes that no host learns; one row too few on one rank is too few on all."""
    world, case = small
    most = max(len(want.source) for want in case.expected)
    results = dispatch(world, case, capacity=most + 3)
    for got, want in zip(results, case.expected, strict=True):
        count = len(want.source)
        assert got.num_tokens_per_expert.tolist() == want.num_tokens_per_expert
        assert_bits(got.x[:count], want.x, "capacity")
        assert bool((got.row_weights[count:] == 0).all())
    over = dispatch(world, case, capacity=most - 1)
    for engine, got in zip(world.engines, over, strict=True):
        assert int(got.num_tokens_per_expert.sum()) == 0 and int(engine.overflowed()) == 1
    outs = world.all(
        lambda engine, rank: engine.combine(CombineCall(y=torch.zeros_like(over[rank].x), handle=over[rank].handle))
    )
    assert all(bool(out.x.isnan().all()) for out in outs)


def test_a_heap_that_is_too_small_grows(kernels: CpuKernels) -> None:
    """All ranks find out in the same exchange and repeat it; what lies in the old heap stays good."""
    world = World(kernels, 2, hidden=512, num_experts=4, num_topk=2, max_tokens=60, num_sms=2, arena_bytes=64 << 10)
    work = make_workload("uniform", num_ranks=2, num_experts=4, num_topk=2, num_tokens=60, seed=1)
    small = make_workload("uniform", num_ranks=2, num_experts=4, num_topk=2, num_tokens=4, seed=2)
    cases = [
        Case(
            each, [random_payload(r, count, 512, torch.bfloat16, 1) for r, count in enumerate(each.num_tokens)], [0, 0]
        )
        for each in (small, work)
    ]
    before = [engine.arena.heap for engine in world.engines]
    kept = [dispatch(world, case) for case in cases]
    assert all(engine.arena.heap is not heap for engine, heap in zip(world.engines, before, strict=True))
    for case, results in zip(cases, kept, strict=True):
        for rank, got in enumerate(results):
            case.check(rank, got)


@pytest.mark.parametrize(("spare", "has_room"), [(40, True), (8, False)])
def test_a_combine_that_may_take_more_than_there_is(
    kernels: CpuKernels, spare: int, has_room: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With a capacity the host knows the most that it takes (60 rows of a KiB), the device what it does take (near 30);
    nobody waits for what the device says."""
    world = World(
        kernels, 2, hidden=512, num_experts=4, num_topk=1, max_tokens=60, num_sms=2, arena_bytes=86016 + (spare << 10)
    )
    work = make_workload("uniform", num_ranks=2, num_experts=4, num_topk=1, num_tokens=60, seed=1)
    case = Case(work, [random_payload(r, 60, 512, torch.bfloat16, 1) for r in range(2)], [0, 0])
    kept = dispatch(world, case, capacity=80)
    outs = world.all(lambda engine, rank: engine.combine(CombineCall(y=kept[rank].x.clone(), handle=kept[rank].handle)))
    warnings = [record.getMessage() for record in caplog.records if "more arena_bytes" in record.getMessage()]
    assert len(warnings) == 2, caplog.text
    if has_room:
        for rank, out in enumerate(outs):
            assert_bits(out.x, case.xs[rank], "the only expert's row comes home")
            world.engines[rank].check()
    else:
        assert all(bool(out.x.isnan().all()) for out in outs)
        for engine in world.engines:
            with pytest.raises(CapacityError):
                engine.check()


def test_the_host_ends_a_wait(kernels: CpuKernels) -> None:
    """By a word of its own memory, long before the deadline: nobody else comes to this operation."""
    world = World(kernels, 2, hidden=128, num_experts=4, num_topk=1, max_tokens=20, num_sms=2, timeout_s=60.0)
    work = make_workload("uniform", num_ranks=2, num_experts=4, num_topk=1, num_tokens=20, seed=1)
    case = Case(work, [random_payload(r, 20, 128, torch.bfloat16, 1) for r in range(2)], [0, 0])
    engine = world.engines[0]
    word = ctypes.c_uint64.from_address(engine.buffers.stop_address)
    timer = threading.Timer(0.3, lambda: setattr(word, "value", 1))
    start = time.monotonic()
    timer.start()
    engine._dispatches.issue(case.call(0), is_split=False)  # its kernel has ended when this returns
    assert 0.2 < time.monotonic() - start < 30
    assert Workspace.from_address(engine.buffers.workspace.data_ptr()).is_faulty == 1
    assert engine.buffers.board.kind == 0, "no deadline was missed"


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
def test_refusals_are_everybody_s(small: tuple[World, Case], what: str, message: str) -> None:
    """All ranks raise the same; the next operation is as if nothing had been."""
    world, case = small

    def spoilt(rank: int) -> DispatchCall:
        call = case.call(rank)
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

    raised = world.each(lambda engine, rank: engine.dispatch(spoilt(rank)))
    assert all(isinstance(error, ConfigError) and message in str(error) for error in raised), raised
    for rank, got in enumerate(dispatch(world, case)):
        case.check(rank, got)
