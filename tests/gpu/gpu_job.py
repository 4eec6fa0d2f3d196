"""What the ranks of the GPU tests share: Runtimes over MPI, ranks on shared GPUs, comparisons bit by bit.

Functions named *_rank run on every rank, under mpirun.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from row_cases import assert_bits, assert_combined, assert_dispatched, combine_inputs
from torch import Tensor

from commlib import reference
from commlib.bootstrap import Bootstrap, connect
from commlib.config import RuntimeConfig
from commlib.errors import CapacityError, CommTimeout, ConfigError
from commlib.handle import Dispatched
from commlib.quant import quantize_e4m3
from commlib.runtime import Runtime
from commlib.testing.payloads import assert_identity, identity_payload, random_payload
from commlib.testing.workloads import WORKLOADS, Workload, make_workload

LAYOUTS = ("grouped", "rows")
ALIGNMENTS = (8, 1, 128)


def join() -> tuple[Bootstrap, torch.device]:
    """The job, and this rank's GPU: ranks take turns where there are fewer GPUs."""
    from mpi4py import MPI  # here: importing it starts MPI, which is not for ranks that die

    boot = connect(MPI.COMM_WORLD)
    device = torch.device("cuda", boot.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return boot, device


@contextmanager
def open_runtime(
    boot: Bootstrap, device: torch.device, work: Workload, hidden: int, **changes: Any
) -> Iterator[Runtime]:
    topology = changes.pop("topology", None)
    values = {
        "hidden": hidden,
        "num_experts": work.num_experts,
        "num_topk": work.num_topk,
        "max_tokens": 128,
        "expert_alignment": 8,
        "timeout_s": 60.0,
        "num_sms": 4,
        "arena_bytes": 256 << 20,
        **changes,
    }
    with Runtime(boot, RuntimeConfig(**values), device=device, topology=topology) as runtime:
        yield runtime
        torch.cuda.synchronize()
        runtime.check()


def workload_of(name: str, num_ranks: int, seed: int = 0, num_tokens: int = 37) -> Workload:
    return make_workload(name, num_ranks=num_ranks, num_experts=12, num_topk=3, num_tokens=num_tokens, seed=seed)


@dataclass
class Case:
    """One dispatch and what the oracle says about it."""

    work: Workload
    layout: str
    alignment: int
    xs: list[Tensor]
    fp8: str | None = None

    def __post_init__(self) -> None:
        self.expected = reference.dispatch(
            self.xs,
            self.work.topk_idx,
            self.work.topk_weights,
            self.work.num_experts,
            layout=self.layout,
            expert_alignment=self.alignment,
            fp8=self.fp8,
        )

    @property
    def name(self) -> str:
        return f"{self.work.name} {self.layout} {self.xs[0].dtype} align {self.alignment} fp8={self.fp8}"

    def dispatch(self, runtime: Runtime, **changes: Any) -> Dispatched:
        rank = runtime.rank
        values = {"layout": self.layout, "expert_alignment": self.alignment, "fp8": self.fp8, **changes}
        x = values.pop("x", self.xs[rank]).cuda()
        return runtime.dispatch(x, self.work.topk_idx[rank].cuda(), self.work.topk_weights[rank].cuda(), **values)

    def check(self, rank: int, got: Dispatched, *, is_by_handle: bool = False) -> None:
        what = f"rank {rank}: {self.name} by handle {is_by_handle}"
        assert_dispatched(got, self.expected[rank], what, is_by_handle=is_by_handle)
        load = sum(idx.flatten().add(1).bincount(minlength=self.work.num_experts + 1)[1:] for idx in self.work.topk_idx)
        assert isinstance(load, Tensor) and got.handle.load() == load.tolist()

    def combine(self, runtime: Runtime, got: Dispatched, dtype: torch.dtype, seed: int, weighted: bool, grads: bool):
        """Combines made-up expert rows and compares; padding holds NaNs that must not be read."""
        inputs = combine_inputs(self.expected, self.layout, self.work.num_topk, dtype, seed)
        own = runtime.rank
        combined = runtime.combine(
            inputs.ys[own].cuda(),
            got.handle,
            weights=inputs.weights[own].cuda() if weighted else None,
            weight_grads=inputs.grads[own].cuda() if grads else None,
        )
        assert_combined(
            combined,
            own,
            inputs,
            self.expected,
            self.work,
            list(runtime.topology.node_of_rank),
            f"rank {own}: combine {self.name} {dtype} weighted {weighted} grads {grads}",
            is_weighted=weighted,
            has_grads=grads,
        )
        return combined


def case_of(
    work: Workload, layout: str, alignment: int, hidden: int, dtype: torch.dtype, fp8: str | None = None, seed: int = 3
) -> Case:
    xs = [random_payload(rank, count, hidden, dtype, seed) for rank, count in enumerate(work.num_tokens)]
    return Case(work, layout, alignment, xs, fp8)


def check_plain(runtime: Runtime, work: Workload, hidden: int, dtypes: Sequence[torch.dtype], seed: int) -> None:
    """Identity payloads through a fresh dispatch, one by handle, and combines of every kind."""
    rank = runtime.rank
    for layout in LAYOUTS:
        for place, dtype in enumerate(dtypes):
            alignment = ALIGNMENTS[(seed + place) % len(ALIGNMENTS)]
            xs = [identity_payload(r, count, hidden, dtype) for r, count in enumerate(work.num_tokens)]
            case = Case(work, layout, alignment, xs)
            got = case.dispatch(runtime)
            assert_identity(got.x.cpu(), case.expected[rank].source)
            case.check(rank, got)
            case.combine(runtime, got, dtype, seed, False, False)
            case.combine(runtime, got, torch.bfloat16, seed + 1, True, True)
            again = case_of(work, layout, alignment, hidden, dtype)
            by_handle = runtime.dispatch(again.xs[rank].cuda(), handle=got.handle)
            again.check(rank, by_handle, is_by_handle=True)
            case.combine(runtime, by_handle, dtype, seed + 2, True, False)
            case.check(rank, got)  # nothing has touched the first result


def check_fp8(runtime: Runtime, work: Workload, hidden: int) -> None:
    rank = runtime.rank
    for layout in LAYOUTS:
        for kind, dtype in (("fp32", torch.bfloat16), ("pow2", torch.bfloat16), ("fp32", torch.float32)):
            case = case_of(work, layout, 8, hidden, dtype, kind)
            got = case.dispatch(runtime)
            case.check(rank, got)
            q, scales = quantize_e4m3(case.xs[rank], pow2=kind == "pow2")
            case.check(rank, case.dispatch(runtime, x=q, scales=scales.cuda(), fp8=None))
            case.combine(runtime, got, torch.bfloat16, 5, True, False)
            case.check(rank, runtime.dispatch(case.xs[rank].cuda(), handle=got.handle, fp8=kind), is_by_handle=True)


def plain_rank(names: list[str], hidden: int, num_tokens: int) -> None:
    boot, device = join()
    for seed, name in enumerate(names or WORKLOADS):
        work = workload_of(name, boot.size, seed, num_tokens)
        with open_runtime(boot, device, work, hidden, max_tokens=max(128, num_tokens)) as runtime:
            check_plain(runtime, work, hidden, (torch.bfloat16, torch.float32), seed)
    print(f"rank {boot.rank}: plain {names or WORKLOADS} hidden {hidden} OK", flush=True)


def fp8_rank(names: list[str], hidden: int) -> None:
    boot, device = join()
    for name in names:
        work = workload_of(name, boot.size)
        with open_runtime(boot, device, work, hidden) as runtime:
            check_fp8(runtime, work, hidden)
    print(f"rank {boot.rank}: fp8 {names} hidden {hidden} OK", flush=True)


def errors_rank() -> None:
    """Bad inputs, disagreement and lack of room raise everywhere, move nothing, and leave the Runtime usable."""
    boot, device = join()
    work = workload_of("uniform", boot.size)
    last = boot.size - 1
    with open_runtime(boot, device, work, 256, arena_bytes=1 << 20) as runtime:
        case = case_of(work, "grouped", 8, 256, torch.bfloat16)
        rank = boot.rank

        def expect(kind: type[Exception], match: str, **changes: Any) -> None:
            with pytest.raises(kind, match=match):
                case.dispatch(runtime, **changes)

        x, idx, weights = case.xs[rank].cuda(), work.topk_idx[rank].cuda(), work.topk_weights[rank].cuda()
        for text, change in (("expert id 99 at token 5, slot 1", 99), ("occurs twice at token 5, slot 1", None)):
            bad = idx.clone()
            if rank == last:
                bad[5, 1] = bad[5, 0] if change is None else change
            with pytest.raises(ConfigError, match=f"rank {last}: .*{text} on rank {last}"):
                runtime.dispatch(x, bad, weights)
        bad_weights = weights.clone()
        if rank == last:
            bad_weights[2, 2] = torch.nan
        with pytest.raises(ConfigError, match=f"weight nan at token 2, slot 2 on rank {last} is not finite"):
            runtime.dispatch(x, idx, bad_weights)
        with pytest.raises(ConfigError, match=f"rank {last}: x has dtype float64"):
            runtime.dispatch(x.double() if rank == last else x, idx, weights)
        expect(ConfigError, "ranks disagree about the call", layout="rows" if rank == last else "grouped")
        expect(CapacityError, "do not fit into the .* free on the device", expert_alignment=1 << 26)
        expect(ConfigError, "expert_alignment=1073741824: .* the limit is 2\\^31-1", expert_alignment=1 << 30)
        got = case.dispatch(runtime)
        case.check(rank, got)
        case.combine(runtime, got, torch.bfloat16, 1, True, True)
    print(f"rank {boot.rank}: errors OK", flush=True)


def timeout_rank() -> None:
    """A rank that stays away gives CommTimeout on the others; the process and its CUDA context go on."""
    boot, device = join()
    work = workload_of("uniform", boot.size)
    case = case_of(work, "grouped", 8, 256, torch.bfloat16)
    last = boot.size - 1
    config = RuntimeConfig(hidden=256, num_experts=12, num_topk=3, max_tokens=128, timeout_s=1.0, num_sms=4)
    runtime = Runtime(boot, config, device=device)
    if boot.rank != last:
        start = time.monotonic()
        with pytest.raises(CommTimeout, match=f"waited for rank {last} in exchange") as caught:
            case.dispatch(runtime)
        assert caught.value.peer == last and caught.value.seen == 0 and time.monotonic() - start < 20
        with pytest.raises(CommTimeout):
            case.dispatch(runtime)
    assert float(torch.ones(8, device=device).sum()) == 8.0
    boot.barrier(60)
    if boot.rank == last:  # comes too late: it finds the others' note
        with pytest.raises(CommTimeout, match=f"waited for rank {last} in exchange"):
            case.dispatch(runtime)
    runtime.close()
    boot.barrier(60)
    with open_runtime(boot, device, work, 256) as again:
        case.check(boot.rank, case.dispatch(again))
    print(f"rank {boot.rank}: timeout OK", flush=True)


def streams_rank() -> None:
    """Halves on side streams behind slow producers; results feed consumers without any synchronisation."""
    boot, device = join()
    work = workload_of("uniform", boot.size, num_tokens=64)
    hidden = 1024
    with open_runtime(boot, device, work, hidden) as runtime:
        rank = boot.rank
        case = case_of(work, "grouped", 8, hidden, torch.bfloat16)
        idx, weights = work.topk_idx[rank].cuda(), work.topk_weights[rank].cuda()
        cases = [case, Case(work, "grouped", 8, [-x for x in case.xs])]
        sources, x = [each.xs[rank].cuda() for each in cases], torch.empty_like(case.xs[rank], device=device)
        ballast = torch.randn(4096, 4096, device=device)
        side = torch.cuda.Stream()
        outs = []
        for turn in range(8):
            with torch.cuda.stream(side):
                x.zero_()
                for _ in range(4):
                    ballast = ballast @ ballast * 1e-4
                x.copy_(sources[turn % 2])
                got = runtime.dispatch_recv(runtime.dispatch_send(x, idx, weights, expert_alignment=8))
                handle = got.handle
                y = got.x * 2
                del got  # its memory is granted again by the next operation
                sent = runtime.combine_send(y, handle)
                outs.append((y, runtime.combine_recv(sent).x))
        torch.cuda.synchronize()
        nodes = [0] * boot.size
        for turn, (y, out) in enumerate(outs):
            case = cases[turn % 2]
            ys = [received.x * 2 for received in case.expected]
            combined = reference.combine(ys, case.expected, work.topk_idx, work.num_experts, nodes)[rank][0]
            assert_bits(y, ys[rank], "streams: dispatch")
            assert_bits(out, combined, "streams: combine")
    print(f"rank {boot.rank}: streams OK", flush=True)
