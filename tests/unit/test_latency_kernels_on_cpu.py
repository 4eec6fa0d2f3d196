"""The latency regime, its kernels compiled for this CPU: all ranks against the oracle, without a GPU."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
import torch
from engines_on_cpu import World
from kernels_on_cpu import CpuKernels
from torch import Tensor

from commlib import reference
from commlib.cuda.params import FaultNote
from commlib.errors import ConfigError
from commlib.executor import CombineCall, DispatchCall
from commlib.handle import Dispatched
from commlib.layout import record_bytes
from commlib.testing.payloads import random_payload
from commlib.testing.workloads import Workload, make_workload

pytestmark = pytest.mark.usefixtures("without_cuda")


def dispatch(world: World, calls: list[DispatchCall]) -> list[Dispatched]:
    return world.all(lambda engine, rank: engine.dispatch(calls[rank]))


def guarded(tensor: Tensor) -> Tensor:
    """A copy that ends where memory ends: whoever reads on crashes."""
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    whole = np.frombuffer(memory, dtype=np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    end = ctypes.c_void_p(whole.ctypes.data + pages * page)
    assert libc.mprotect(end, ctypes.c_size_t(page), mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0) == 0
    first = pages * page - size
    copy = torch.from_numpy(whole[first : first + size]).view(tensor.dtype).view(tensor.shape)
    copy.copy_(tensor)
    return copy


def calls_of(work: Workload, xs: list[Tensor], **options: Any) -> list[DispatchCall]:
    # Inputs are aligned to 16 bytes, as `check_tensor` would make them: that copy would lose the guard.
    def place(tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        return guarded(tensor) if size and size % 16 == 0 else tensor

    return [
        DispatchCall(x=place(x), topk_idx=place(idx), topk_weights=place(weights), regime="latency", **options)
        for x, idx, weights in zip(xs, work.topk_idx, work.topk_weights, strict=True)
    ]


def check(world: World, work: Workload, xs: list[Tensor], results: list[Dispatched], alignment: int, fp8: str | None):
    expected = reference.dispatch(
        xs, work.topk_idx, work.topk_weights, work.num_experts, layout="grouped", expert_alignment=alignment, fp8=fp8
    )
    for rank, (got, want) in enumerate(zip(results, expected, strict=True)):
        count = len(want.source)
        assert got.num_tokens_per_expert.tolist() == want.num_tokens_per_expert
        assert torch.equal(got.x[:count].view(torch.uint8), want.x.view(torch.uint8))
        if fp8 is not None:
            assert torch.equal(got.scales[:count], want.scales)
        assert torch.equal(got.row_weights[:count], want.row_weights) and bool((got.row_weights[count:] == 0).all())
        check_handle(world, work, rank, got, want.source)


def check_combine(world: World, work: Workload, xs: list[Tensor], results: list[Dispatched], alignment: int) -> None:
    """Made-up rows of experts, with their weights and without; padding and what nobody sent are NaNs."""
    expected = reference.dispatch(
        xs, work.topk_idx, work.topk_weights, work.num_experts, layout="grouped", expert_alignment=alignment
    )
    ys = [random_payload(r, len(want.source), xs[0].shape[1], torch.bfloat16, 9) for r, want in enumerate(expected)]
    given = [torch.full_like(got.x, torch.nan, dtype=torch.bfloat16) for got in results]
    for rows, y, want in zip(given, ys, expected, strict=True):
        y[want.source[:, 0] < 0] = torch.nan
        rows[: len(y)] = y
    for is_weighted in (True, False):
        weights = [want.row_weights for want in expected] if is_weighted else None
        wanted = reference.combine(ys, expected, work.topk_idx, work.num_experts, [0] * len(ys), weights=weights)
        outs = world.all(
            lambda engine, rank, is_weighted=is_weighted: engine.combine(
                CombineCall(
                    y=given[rank],
                    handle=results[rank].handle,
                    weights=results[rank].row_weights if is_weighted else None,
                )
            )
        )
        for out, (want, _) in zip(outs, wanted, strict=True):
            assert torch.equal(out.x.view(torch.uint8), want.view(torch.uint8))


def check_handle(world: World, work: Workload, rank: int, got: Dispatched, source: Tensor) -> None:
    """What combine reads: the rows of every token that came, and the ranks that own tokens went to."""
    native, topk = got.handle._native, work.num_topk
    assert int(native.state) == 0
    words = native.records.view(len(world.engines), -1, record_bytes(topk) // 4)
    rows = words[..., 4:].reshape(len(world.engines), -1, topk, 3)[..., 1]
    wanted = torch.full_like(rows, -1)
    for row, (sender, token, slot) in enumerate(source.tolist()):
        if sender >= 0:
            wanted[sender, token, slot] = row
    for sender, count in enumerate(work.num_tokens):
        assert torch.equal(rows[sender, :count], wanted[sender, :count])
        assert bool((rows[sender, count:] == -1).all())
    idx = work.topk_idx[rank]
    owners = torch.where(idx >= 0, idx // (work.num_experts // len(world.engines)), -1).int()
    assert torch.equal(native.owners[: idx.numel()].view_as(idx), owners)


SHAPES = [
    # ranks, experts per rank, top-k, most tokens, hidden, blocks
    (2, 6, 3, 40, 512, 2),
    (1, 4, 1, 5, 8, 1),
    (3, 5, 2, 33, 128, 3),
    (2, 40, 8, 32, 2048, 2),
    (4, 3, 10, 17, 256, 1),
    (2, 33, 32, 7, 1024 + 8, 3),
    (2, 17, 32, 32, 200, 1),  # more choices than a block packs at once
]


@pytest.mark.parametrize("ranks, experts, topk, tokens, hidden, blocks", SHAPES)
def test_there_and_back(
    kernels: CpuKernels, ranks: int, experts: int, topk: int, tokens: int, hidden: int, blocks: int
) -> None:
    """One operation after the other in the same slots: kinds of rows, workloads, alignments."""
    shape = {"hidden": hidden, "num_experts": experts * ranks, "num_topk": topk}
    world = World(kernels, ranks, max_tokens=64, decode_tokens=tokens, num_sms=blocks, **shape)
    casts = (None, "pow2", "fp32") if hidden % 128 == 0 else (None,)
    for seed, name in enumerate(("uniform", "masked", "uneven", "empty_rank", "hot")):
        work = make_workload(
            name, num_ranks=ranks, num_experts=experts * ranks, num_topk=topk, num_tokens=tokens, seed=seed
        )
        if max(work.num_tokens) > tokens:
            continue
        fp8, alignment = casts[seed % len(casts)], (1, 8, 3)[seed % 3]
        xs = [random_payload(r, count, hidden, torch.bfloat16, seed) for r, count in enumerate(work.num_tokens)]
        results = dispatch(world, calls_of(work, xs, fp8=fp8, expert_alignment=alignment))
        check(world, work, xs, results, alignment, fp8)
        if seed in (0, 3):
            check_combine(world, work, xs, results, alignment)


@pytest.fixture
def small(kernels: CpuKernels) -> tuple[World, Workload, list[Tensor]]:
    world = World(kernels, 2, hidden=128, num_experts=12, num_topk=3, max_tokens=20, decode_tokens=20, num_sms=2)
    work = make_workload("uniform", num_ranks=2, num_experts=12, num_topk=3, num_tokens=20, seed=1)
    return world, work, [random_payload(r, count, 128, torch.bfloat16, 1) for r, count in enumerate(work.num_tokens)]


def test_halves(small: tuple[World, Workload, list[Tensor]]) -> None:
    """Two sends, then their receives, again and again: each has a generation of slots."""
    world, work, xs = small
    others = [-x for x in xs]
    for _ in range(3):
        pending = []
        for rows in (xs, others):
            calls = calls_of(work, rows, expert_alignment=1)
            pending.append(world.each(lambda engine, rank, calls=calls: engine.dispatch_send(calls[rank])))
        for rows, each in zip((xs, others), pending, strict=True):
            got = world.each(lambda engine, rank, each=each: engine.dispatch_recv(each[rank]))
            check(world, work, rows, got, 1, None)


def test_too_many_rows_for_one_rank_are_too_many_for_all(small: tuple[World, Workload, list[Tensor]]) -> None:
    world, work, xs = small
    rows = [len(each.source) for each in reference.dispatch(xs, work.topk_idx, work.topk_weights, 12, layout="grouped")]
    for capacity, is_over in ((max(rows), False), (max(rows) - 1, True)):
        results = dispatch(world, calls_of(work, xs, expert_alignment=1, capacity=capacity))
        for rank, got in enumerate(results):
            assert int(got.handle._native.state) == is_over and int(world.engines[rank].overflowed()) == is_over
            assert int(got.num_tokens_per_expert.sum()) == (0 if is_over else rows[rank])


def spoilt(values: Tensor, token: int, slot: int, value: float) -> Tensor:
    values = values.clone()
    values[token, slot] = value
    return values


def check_refused(world: World, calls: list[DispatchCall], message: str) -> None:
    for engine, got in zip(world.engines, dispatch(world, calls), strict=True):
        assert int(got.handle._native.state) == 1 and int(got.num_tokens_per_expert.sum()) == 0
        with pytest.raises(ConfigError, match=message):
            engine.check()


@pytest.mark.parametrize(
    "what, message",
    [
        ("expert", "expert id 99 at token 5, slot 1 on rank 1"),
        ("negative", "expert id -7 at token 5, slot 1 on rank 1"),
        ("huge", f"expert id {2**40} at token 5, slot 1 on rank 1"),
        ("twice", "occurs twice at token 7, slot 2 on rank 1"),
        ("weight", "weight inf at token 19, slot 0 on rank 1"),
    ],
)
def test_bad_choices(small: tuple[World, Workload, list[Tensor]], what: str, message: str) -> None:
    """All ranks find the same, and the next operation is as if nothing had been. A packet holds eight choices: those
    of token 7 begin in one and end in the next."""
    world, work, xs = small
    calls = calls_of(work, xs, expert_alignment=1)
    idx, weights = calls[1].topk_idx, calls[1].topk_weights
    if what == "weight":
        weights = spoilt(weights, 19, 0, float("inf"))
    elif what == "twice":
        idx = spoilt(idx, 7, 2, int(idx[7, 0]))
    else:
        idx = spoilt(idx, 5, 1, {"expert": 99, "negative": -7, "huge": 2**40}[what])
    check_refused(world, [calls[0], calls[1]._replace(topk_idx=idx, topk_weights=weights)], message)
    check(world, work, xs, dispatch(world, calls), 1, None)


def test_a_choice_that_comes_again_in_another_packet(kernels: CpuKernels) -> None:
    world = World(kernels, 2, hidden=128, num_experts=44, num_topk=22, max_tokens=3, decode_tokens=3, num_sms=1)
    work = make_workload("uniform", num_ranks=2, num_experts=44, num_topk=22, num_tokens=3, seed=1)
    xs = [random_payload(r, count, 128, torch.bfloat16, 1) for r, count in enumerate(work.num_tokens)]
    calls = calls_of(work, xs, expert_alignment=1)
    idx = spoilt(calls[0].topk_idx, 2, 21, int(calls[0].topk_idx[2, 0]))
    bad = [calls[0]._replace(topk_idx=idx), calls[1]]
    check_refused(world, bad, "occurs twice at token 2, slot 21 on rank 0")


def test_a_rank_that_refuses_or_differs(small: tuple[World, Workload, list[Tensor]]) -> None:
    world, work, xs = small
    calls = calls_of(work, xs, expert_alignment=1)
    bad = [calls[0], calls[1]._replace(x=calls[1].x.double())]
    got, error = world.each(lambda engine, rank: engine.dispatch(bad[rank]))
    assert isinstance(error, ConfigError) and "x has dtype float64" in str(error)
    assert int(got.handle._native.state) == 1
    with pytest.raises(ConfigError, match="rank 1 refused its own input"):
        world.engines[0].check()
    world.engines[1].check()  # it has raised already
    options = [calls[0], calls[1]._replace(expert_alignment=4)]
    for number, got in enumerate(dispatch(world, options)):
        assert int(got.handle._native.state) == 1
        with pytest.raises(ConfigError, match=f"rank {1 - number} calls it with other arguments"):
            world.engines[number].check()
    check(world, work, xs, dispatch(world, calls), 1, None)


def test_a_rank_that_does_not_come(kernels: CpuKernels) -> None:
    """Blocks leave at the deadline, and the note says for whom they waited."""
    options = {"hidden": 128, "num_experts": 4, "num_topk": 2, "max_tokens": 4, "decode_tokens": 4, "num_sms": 2}
    world = World(kernels, 2, timeout_s=0.05, **options)
    work = make_workload("uniform", num_ranks=2, num_experts=4, num_topk=2, num_tokens=4, seed=1)
    xs = [random_payload(r, count, 128, torch.bfloat16, 1) for r, count in enumerate(work.num_tokens)]
    world.engines[0].dispatch(calls_of(work, xs, expert_alignment=1)[0])
    note = FaultNote.from_address(world.engines[0].mesh.board)
    assert (note.kind, note.rank, note.peer, note.expected, note.seen) == (1, 0, 1, 1, 0)
