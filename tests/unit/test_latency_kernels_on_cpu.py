"""Dispatch of the latency regime, its kernel compiled for this CPU: all ranks against the oracle, without a GPU."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commlib import reference
from commlib.config import RuntimeConfig
from commlib.cuda.calls import refusal
from commlib.cuda.latency import LatencyOps, PendingLatency
from commlib.cuda.memory import Regions
from commlib.cuda.params import FaultNote, HostResult, Mesh, Workspace, sizeof
from commlib.errors import ConfigError
from commlib.executor import DispatchCall
from commlib.handle import Dispatched
from commlib.layout import record_bytes
from commlib.testing.payloads import random_payload
from commlib.testing.workloads import Workload, make_workload

NATIVE = Path(__file__).resolve().parents[2] / "native"
EMULATION = NATIVE / "tests" / "cuda_on_cpu"
WARPS = 2  # of a block; on a GPU LATENCY_WARPS


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("kernels") / "latency.so"
    # The folder of the emulation comes first: its cuda/ptx.cuh takes the place of the real one.
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", f"-I{EMULATION}", f"-I{NATIVE}"]
    command = ["g++", *options, "-o", str(path), str(EMULATION / "latency_kernels.cc"), "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


def zeros(num_bytes: int) -> np.ndarray:
    """Page-aligned."""
    return np.frombuffer(mmap.mmap(-1, max(1, num_bytes)), dtype=np.uint8)


class KeepingOps(LatencyOps):
    """On a GPU what is freed behind a launch stays until the kernel has run."""

    def _launch(self, pending: PendingLatency, phases: int) -> None:
        self._queue.kept.append(pending)
        super()._launch(pending, phases)


class Rank:
    """What `LatencyOps` knows of its engine. Launches wait until all ranks have made theirs."""

    def __init__(self, rank: int, num_ranks: int, config: RuntimeConfig, regions: Regions) -> None:
        self.config, self.num_ranks, self.num_sms, self.runtime_id = config, num_ranks, config.num_sms, 1
        self.device = torch.device("cpu")
        self.arena = SimpleNamespace(regions=regions)
        self.control, self._scratch = zeros(regions.total_bytes), zeros(1 << 16)
        scratch = self._scratch.ctypes.data
        assert sizeof(FaultNote) <= 1 << 12 and sizeof(Workspace) <= 1 << 12 and sizeof(HostResult) <= 1 << 15
        self.workspace = Workspace.from_address(scratch + (1 << 12))
        self.refused = HostResult.from_address(scratch + (1 << 15))
        self.buffers = SimpleNamespace(refused_address=scratch + (1 << 15))
        self.mesh = Mesh(
            rank=rank,
            num_ranks=num_ranks,
            num_experts=config.num_experts,
            num_topk=config.num_topk,
            max_tokens=config.max_tokens,
            experts_per_rank=config.num_experts // num_ranks,
            timeout_ns=int(config.timeout_s * 1e9),
            board=scratch,
            workspace=scratch + (1 << 12),
            **{name: regions.offsets[name] for name in ("fault_word", "fault_note")},
        )
        self._ticket = 0
        self.launched: list[Any] = []
        self.kept: list[PendingLatency] = []
        self.ops = KeepingOps(self)

    def check_usable(self) -> None:
        pass

    def next_ticket(self) -> int:
        self._ticket += 1
        return self._ticket

    def launch_latency(self, call: Any) -> None:
        self.launched.append((call.shared_bytes, *call.arguments.structs))


class World:
    def __init__(self, library: ctypes.CDLL, num_ranks: int, **options: Any) -> None:
        self._library = library
        self.config = RuntimeConfig(max_tokens=64, timeout_s=20.0, **options)
        self.regions = Regions(self.config, num_ranks)
        self.ranks = [Rank(rank, num_ranks, self.config, self.regions) for rank in range(num_ranks)]
        for rank in self.ranks:
            rank.mesh.base[:num_ranks] = [each.control.ctypes.data for each in self.ranks]

    def run(self, *, without: int | None = None) -> None:
        """What the ranks have launched; `without`: but for a rank that does not come."""
        while any(rank.launched for rank in self.ranks):
            calls = [rank.launched.pop(0) for rank in self.ranks]
            if without is not None:
                del calls[without]
            pointers = ctypes.c_void_p * len(calls)
            regions = self.regions.latency()
            self._library.run_latency_dispatch(
                pointers(*(ctypes.addressof(mesh) for _, mesh, _, _ in calls)),
                ctypes.byref(regions),
                pointers(*(ctypes.addressof(call) for *_, call in calls)),
                len(calls),
                self.config.num_sms,
                32 * WARPS,
                ctypes.c_size_t(calls[0][0]),
            )

    def each(self, function: Callable[[Rank, int], Any]) -> list[Any]:
        return [function(rank, number) for number, rank in enumerate(self.ranks)]


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


def check_handle(world: World, work: Workload, rank: int, got: Dispatched, source: Tensor) -> None:
    """What combine reads: the rows of every token that came, and the ranks that own tokens went to."""
    native, topk = got.handle._native, work.num_topk
    assert int(native.state) == 0
    words = native.records.view(len(world.ranks), -1, record_bytes(topk) // 4)
    rows = words[..., 4:].reshape(len(world.ranks), -1, topk, 3)[..., 1]
    wanted = torch.full_like(rows, -1)
    for row, (sender, token, slot) in enumerate(source.tolist()):
        if sender >= 0:
            wanted[sender, token, slot] = row
    for sender, count in enumerate(work.num_tokens):
        assert torch.equal(rows[sender, :count], wanted[sender, :count])
        assert bool((rows[sender, count:] == -1).all())
    idx = work.topk_idx[rank]
    owners = torch.where(idx >= 0, idx // (work.num_experts // len(world.ranks)), -1).int()
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
def test_dispatch(
    library: ctypes.CDLL, ranks: int, experts: int, topk: int, tokens: int, hidden: int, blocks: int
) -> None:
    """One operation after the other in the same slots: kinds of rows, workloads, alignments."""
    world = World(
        library,
        ranks,
        hidden=hidden,
        num_experts=experts * ranks,
        num_topk=topk,
        decode_tokens=tokens,
        num_sms=blocks,
    )
    casts = (None, "pow2", "fp32") if hidden % 128 == 0 else (None,)
    for seed, name in enumerate(("uniform", "masked", "uneven", "empty_rank", "hot")):
        work = make_workload(
            name, num_ranks=ranks, num_experts=experts * ranks, num_topk=topk, num_tokens=tokens, seed=seed
        )
        if max(work.num_tokens) > tokens:
            continue
        fp8, alignment = casts[seed % len(casts)], (1, 8, 3)[seed % 3]
        xs = [random_payload(r, count, hidden, torch.bfloat16, seed) for r, count in enumerate(work.num_tokens)]
        calls = calls_of(work, xs, fp8=fp8, expert_alignment=alignment)
        results = world.each(lambda rank, number, calls=calls: rank.ops.dispatch(calls[number]))
        world.run()
        check(world, work, xs, results, alignment, fp8)


@pytest.fixture
def small(library: ctypes.CDLL) -> tuple[World, Workload, list[Tensor]]:
    world = World(library, 2, hidden=128, num_experts=12, num_topk=3, decode_tokens=20, num_sms=2)
    work = make_workload("uniform", num_ranks=2, num_experts=12, num_topk=3, num_tokens=20, seed=1)
    return world, work, [random_payload(r, count, 128, torch.bfloat16, 1) for r, count in enumerate(work.num_tokens)]


def test_halves(small: tuple[World, Workload, list[Tensor]]) -> None:
    """Two sends, then their receives, again and again: each has a generation of slots."""
    world, work, xs = small
    others = [-x for x in xs]
    for _ in range(3):
        pending: list[list[PendingLatency]] = []
        for rows in (xs, others):
            calls = calls_of(work, rows, expert_alignment=1)
            pending.append(world.each(lambda rank, number, calls=calls: rank.ops.dispatch_send(calls[number])))
        world.run()
        for rows, each in zip((xs, others), pending, strict=True):
            got = world.each(lambda rank, number, each=each: rank.ops.receive(each[number], "latency dispatch"))
            world.run()
            check(world, work, rows, got, 1, None)


def test_too_many_rows_for_one_rank_are_too_many_for_all(small: tuple[World, Workload, list[Tensor]]) -> None:
    world, work, xs = small
    rows = [len(each.source) for each in reference.dispatch(xs, work.topk_idx, work.topk_weights, 12, layout="grouped")]
    for capacity, is_over in ((max(rows), False), (max(rows) - 1, True)):
        calls = calls_of(work, xs, expert_alignment=1, capacity=capacity)
        results = world.each(lambda rank, number, calls=calls: rank.ops.dispatch(calls[number]))
        world.run()
        for rank, got in zip(world.ranks, results, strict=True):
            assert int(got.handle._native.state) == is_over and rank.workspace.overflowed == is_over
            assert int(got.num_tokens_per_expert.sum()) == (0 if is_over else rows[world.ranks.index(rank)])


def spoilt(values: Tensor, token: int, slot: int, value: float) -> Tensor:
    values = values.clone()
    values[token, slot] = value
    return values


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
    bad = [calls[0], calls[1]._replace(topk_idx=idx, topk_weights=weights)]
    results = world.each(lambda rank, number: rank.ops.dispatch(bad[number]))
    world.run()
    for rank, got in zip(world.ranks, results, strict=True):
        assert int(got.handle._native.state) == 1 and int(got.num_tokens_per_expert.sum()) == 0
        assert rank.refused.ticket != 0
        assert message in str(refusal(rank.refused, 2, 3, 12))
    again = world.each(lambda rank, number: rank.ops.dispatch(calls[number]))
    world.run()
    check(world, work, xs, again, 1, None)


def test_a_choice_that_comes_again_in_another_packet(library: ctypes.CDLL) -> None:
    world = World(library, 2, hidden=128, num_experts=44, num_topk=22, decode_tokens=3, num_sms=1)
    work = make_workload("uniform", num_ranks=2, num_experts=44, num_topk=22, num_tokens=3, seed=1)
    xs = [random_payload(r, count, 128, torch.bfloat16, 1) for r, count in enumerate(work.num_tokens)]
    calls = calls_of(work, xs, expert_alignment=1)
    idx = spoilt(calls[0].topk_idx, 2, 21, int(calls[0].topk_idx[2, 0]))
    bad = [calls[0]._replace(topk_idx=idx), calls[1]]
    world.each(lambda rank, number: rank.ops.dispatch(bad[number]))
    world.run()
    for rank in world.ranks:
        assert "occurs twice at token 2, slot 21 on rank 0" in str(refusal(rank.refused, 2, 22, 44))


def test_a_rank_that_refuses_or_differs(
    small: tuple[World, Workload, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, work, xs = small
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    calls = calls_of(work, xs, expert_alignment=1)
    with pytest.raises(ConfigError, match="x has dtype float64"):
        world.ranks[1].ops.dispatch(calls[1]._replace(x=calls[1].x.double()))
    got = world.ranks[0].ops.dispatch(calls[0])
    world.run()
    assert int(got.handle._native.state) == 1
    assert "rank 1 refused its own input" in str(refusal(world.ranks[0].refused, 2, 3, 12))
    assert world.ranks[1].refused.ticket == 0  # it has raised
    world.ranks[0].refused.ticket = 0
    options = [calls[0], calls[1]._replace(expert_alignment=4)]
    results = world.each(lambda rank, number: rank.ops.dispatch(options[number]))
    world.run()
    for number, (rank, got) in enumerate(zip(world.ranks, results, strict=True)):
        assert int(got.handle._native.state) == 1
        assert f"rank {1 - number} calls it with other arguments" in str(refusal(rank.refused, 2, 3, 12))


def test_a_rank_that_does_not_come(library: ctypes.CDLL) -> None:
    """Blocks leave at the deadline, and the note says for whom they waited."""
    world = World(library, 2, hidden=128, num_experts=4, num_topk=2, decode_tokens=4, num_sms=2)
    for rank in world.ranks:
        rank.mesh.timeout_ns = 50_000_000
    work = make_workload("uniform", num_ranks=2, num_experts=4, num_topk=2, num_tokens=4, seed=1)
    xs = [random_payload(r, count, 128, torch.bfloat16, 1) for r, count in enumerate(work.num_tokens)]
    calls = calls_of(work, xs, expert_alignment=1)
    world.each(lambda rank, number: rank.ops.dispatch(calls[number]))
    world.run(without=1)
    note = FaultNote.from_address(world.ranks[0].mesh.board)
    assert (note.kind, note.rank, note.peer, note.expected, note.seen) == (1, 0, 1, 1, 0)
