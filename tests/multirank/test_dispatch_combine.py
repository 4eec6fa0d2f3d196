"""Dispatch and combine of real ranks against the oracle, bit by bit. Functions named *_rank run on every rank."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_job import (
    HIDDEN,
    assert_bits,
    config_of,
    expert_rows,
    free_ports,
    open_runtime,
    part_of_job,
    wait_for,
)
from row_cases import assert_combined, assert_dispatched, combine_inputs
from torch import Tensor

from commlib import reference
from commlib.bootstrap import Bootstrap
from commlib.errors import ConfigError
from commlib.handle import Dispatched
from commlib.quant import quantize_e4m3
from commlib.runtime import Runtime
from commlib.testing.payloads import assert_identity, identity_payload, random_payload
from commlib.testing.spawn import check_ranks
from commlib.testing.workloads import WORKLOADS, Workload, make_workload
from commlib.topology import Topology

pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem
LAYOUTS = ("grouped", "rows")
DTYPES = (torch.float32, torch.bfloat16)
ALIGNMENTS = (8, 1, 128)
NUM_TOKENS = 19


def workload_of(name: str, nodes: Sequence[int], seed: int = 0) -> Workload:
    return make_workload(
        name,
        num_ranks=len(nodes),
        num_experts=12 if len(nodes) <= 4 else 2 * len(nodes),
        num_topk=3,
        num_tokens=NUM_TOKENS,
        seed=seed,
        node_of_rank=nodes,
        max_nodes=max(1, (max(nodes) + 1) // 2),
    )


@dataclass
class Case:
    """One dispatch and what the oracle says about it."""

    work: Workload
    nodes: tuple[int, ...]
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
        return f"{self.work.name} on nodes {self.nodes}, {self.layout}, {self.xs[0].dtype}, fp8={self.fp8}"

    def dispatch(self, runtime: Runtime, **changes: Any) -> Dispatched:
        rank = runtime.rank
        values = {"layout": self.layout, "expert_alignment": self.alignment, "fp8": self.fp8, **changes}
        x = values.pop("x", self.xs[rank])
        return runtime.dispatch(x, self.work.topk_idx[rank], self.work.topk_weights[rank], **values)

    def check(self, runtime: Runtime, got: Dispatched) -> None:
        assert_dispatched(got, self.expected[runtime.rank], f"rank {runtime.rank}, {self.name}")
        load = sum(idx.flatten().add(1).bincount(minlength=self.work.num_experts + 1)[1:] for idx in self.work.topk_idx)
        assert isinstance(load, Tensor) and got.handle.load() == load.tolist()
        owners = [
            torch.where(idx < 0, -1, idx // (self.work.num_experts // runtime.num_ranks)) for idx in self.work.topk_idx
        ]
        per_rank = [[int((owner == rank).any(dim=1).sum()) for rank in range(runtime.num_ranks)] for owner in owners]
        assert got.handle.num_tokens_per_rank() == per_rank

    def combine(
        self,
        runtime: Runtime,
        got: Dispatched,
        dtype: torch.dtype,
        seed: int,
        *,
        is_weighted: bool,
        has_grads: bool,
    ) -> Tensor:
        """Combines what combine_inputs() says and checks it; returns the tokens."""
        inputs = combine_inputs(self.expected, self.layout, self.work.num_topk, dtype, seed)
        own = runtime.rank
        combined = runtime.combine(
            inputs.ys[own],
            got.handle,
            weights=inputs.weights[own] if is_weighted else None,
            weight_grads=inputs.grads[own] if has_grads else None,
        )
        assert_combined(
            combined,
            own,
            inputs,
            self.expected,
            self.work,
            self.nodes,
            f"rank {own}, {self.name}, combine of {dtype}, weights {is_weighted}, grads {has_grads}",
            is_weighted=is_weighted,
            has_grads=has_grads,
        )
        out: Tensor = combined.x
        return out


def random_case(
    work: Workload, nodes: tuple[int, ...], layout: str, dtype: torch.dtype, alignment: int, fp8: str | None = None
) -> Case:
    xs = [random_payload(rank, count, HIDDEN, dtype, seed=5) for rank, count in enumerate(work.num_tokens)]
    return Case(work, nodes, layout, alignment, xs, fp8)


# --- every routing, layout and payload ----------------------------------------------------------------------------

ONE_NODE = [(0,), (0, 0), (0, 0, 0), (0, 0, 0, 0)]
SEVERAL_NODES = [(0, 0, 1, 1), (0, 1, 2, 3), (0, 1, 1, 1)]


def identity_cases(names: Sequence[str], nodes: tuple[int, ...]) -> Iterator[Case]:
    for number, name in enumerate(names):
        work = workload_of(name, nodes)
        for layout in LAYOUTS:
            for dtype in DTYPES:
                xs = [identity_payload(rank, count, HIDDEN, dtype) for rank, count in enumerate(work.num_tokens)]
                yield Case(work, nodes, layout, ALIGNMENTS[number % len(ALIGNMENTS)], xs)


def check_cases(runtime: Runtime, names: Sequence[str], nodes: tuple[int, ...]) -> list[Tensor]:
    """Returns the combined tokens."""
    combined = []
    for seed, case in enumerate(identity_cases(names, nodes)):
        got = case.dispatch(runtime)
        assert_identity(got.x, case.expected[runtime.rank].source)
        case.check(runtime, got)
        dtype = case.xs[0].dtype
        combined.append(case.combine(runtime, got, dtype, seed, is_weighted=False, has_grads=False))
        combined.append(case.combine(runtime, got, dtype, seed, is_weighted=True, has_grads=True))
    return combined


def check_fp8(runtime: Runtime, names: Sequence[str], nodes: tuple[int, ...], layouts: Sequence[str]) -> None:
    """Casts on the way, rows that are FP8 already, and both by handle; combine goes back in BF16 and FP32."""
    rank = runtime.rank
    for seed, (name, layout) in enumerate((name, layout) for name in names for layout in layouts):
        work = workload_of(name, nodes)
        for kind, dtype in (("fp32", torch.bfloat16), ("pow2", torch.float32)):
            case = random_case(work, nodes, layout, dtype, 8, kind)
            got = case.dispatch(runtime)
            case.check(runtime, got)
            q, scales = quantize_e4m3(case.xs[rank], pow2=kind == "pow2")
            case.check(runtime, case.dispatch(runtime, x=q, scales=scales, fp8=None))
            case.combine(runtime, got, dtype, seed, is_weighted=True, has_grads=False)
            what = f"{case.name} by handle"
            by_handle = runtime.dispatch(case.xs[rank], handle=got.handle, fp8=kind)
            assert_dispatched(by_handle, case.expected[rank], what, is_by_handle=True)
            by_handle = runtime.dispatch(q, scales=scales, handle=got.handle)
            assert_dispatched(by_handle, case.expected[rank], what, is_by_handle=True)
            plain = random_case(work, nodes, layout, dtype, 8)
            by_handle = runtime.dispatch(plain.xs[rank], handle=got.handle)
            assert_dispatched(by_handle, plain.expected[rank], f"{what}, not cast", is_by_handle=True)


def digest(tensors: Sequence[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def open_for(group: Bootstrap, name: str, nodes: tuple[int, ...], **config: Any) -> Runtime:
    return Runtime(group, config_of(workload_of(name, nodes), **config), topology=Topology(nodes))


FEW = ("uniform", "masked", "empty_rank")
OF_ONE_SHAPE = [name for name in WORKLOADS if name != "one_expert_per_rank"]


def check_topology(
    group: Bootstrap, nodes: tuple[int, ...], names: Sequence[str], *, is_complete: bool
) -> list[Tensor]:
    with open_for(group, "uniform", nodes) as runtime:
        check_fp8(runtime, ("masked", "uneven"), nodes, LAYOUTS if is_complete else ("grouped",))
        combined = check_cases(runtime, FEW, nodes)
        check_cases(runtime, [name for name in names if name not in FEW], nodes)
        if nodes == SEVERAL_NODES[0]:
            assert digest(check_cases(runtime, FEW, nodes)) == digest(combined)
    if is_complete and len(nodes) == 4:
        with open_for(group, "one_expert_per_rank", nodes, num_threads=2) as runtime:
            check_cases(runtime, ["one_expert_per_rank"], nodes)
        with open_for(group, "uniform", nodes, num_threads=2) as runtime:
            assert digest(check_cases(runtime, FEW, nodes)) == digest(combined)
    return combined


def oracle_rank(ports: list[int], is_complete: bool) -> None:
    """Ends with a hash of the combined tokens of three topologies."""
    rank = int(os.environ["COMMLIB_RANK"])
    for port, nodes in zip(ports, ONE_NODE if is_complete else [], strict=False):
        if rank < len(nodes):
            group = part_of_job(port, rank, len(nodes))
            check_topology(group, nodes, OF_ONE_SHAPE if len(nodes) == 4 else FEW, is_complete=True)
            group.close()
    group = part_of_job(ports[-1], rank, 4)
    combined: list[Tensor] = []
    for nodes in SEVERAL_NODES:
        names = OF_ONE_SHAPE if is_complete else FEW
        combined += check_topology(group, nodes, names, is_complete=is_complete)
    group.close()
    print(digest(combined))


def test_every_workload_is_bitwise_what_the_oracle_says() -> None:
    """On 1 to 4 ranks of a node and 4 ranks of 2 and 4 nodes; then the same bits in other processes, over TCP."""
    ports = free_ports(5)
    default = check_ranks(f"{HERE}:oracle_rank", 4, args=[ports, True], timeout_s=280)
    tcp = check_ranks(f"{HERE}:oracle_rank", 4, args=[ports, False], env={"UCX_TLS": "tcp,self"}, timeout_s=200)
    assert [each.stdout for each in default] == [each.stdout for each in tcp]
    assert all(len(each.stdout) == 65 for each in default)


# --- handles, halves and memory -----------------------------------------------------------------------------------


def used_bytes(runtime: Runtime) -> int:
    gc.collect()
    return runtime.memory().arena_used_bytes


def check_handles(runtime: Runtime, nodes: tuple[int, ...]) -> None:
    """Four dispatches are alive; their combines and dispatches by handle come in another order, repeatedly."""
    start = used_bytes(runtime)
    cases = [
        random_case(workload_of(name, nodes, seed), nodes, layout, DTYPES[seed % 2], 8)
        for seed, (name, layout) in enumerate(
            [("uniform", "grouped"), ("masked", "rows"), ("uneven", "grouped"), ("all_masked", "rows")]
        )
    ]
    results = [case.dispatch(runtime) for case in cases]
    assert len({got.handle.epoch for got in results}) == len(results)
    for seed, place in enumerate((2, 0, 3, 1, 0, 2, 1)):
        case, got = cases[place], results[place]
        case.combine(runtime, got, DTYPES[seed % 2], seed, is_weighted=seed % 2 == 0, has_grads=seed % 3 == 0)
        repeated = runtime.dispatch(case.xs[runtime.rank], handle=got.handle)
        assert_dispatched(repeated, case.expected[runtime.rank], f"{case.name}, by handle", is_by_handle=True)
        case.check(runtime, got)  # neither has touched the first result
    del case, got, repeated
    cases.clear()
    results.clear()
    assert wait_for(lambda: used_bytes(runtime) == start), (used_bytes(runtime), start)


def check_halves(runtime: Runtime, nodes: tuple[int, ...]) -> None:
    """Two micro-batches: while one's rows travel, the other's are combined."""
    rank = runtime.rank
    work = workload_of("uniform", nodes)
    cases = [random_case(work, nodes, layout, torch.float32, 1) for layout in LAYOUTS]
    sent = [
        runtime.dispatch_send(
            case.xs[rank], work.topk_idx[rank], work.topk_weights[rank], layout=case.layout, expert_alignment=1
        )
        for case in cases
    ]
    first = runtime.dispatch_recv(sent[0])
    back = runtime.combine_send(first.x, first.handle)
    second = runtime.dispatch_recv(sent[1])
    last = runtime.combine_send(second.x, second.handle)
    outs = [runtime.combine_recv(last).x, runtime.combine_recv(back).x]  # not in the order of sending
    assert sent[0].is_finished() and back.is_finished()
    for case, got, out in zip(cases, (first, second), reversed(outs), strict=True):
        case.check(runtime, got)
        ys = [received.x for received in case.expected]
        expected = reference.combine(ys, case.expected, work.topk_idx, work.num_experts, nodes)[rank][0]
        assert_bits(out, expected, case.name)
    with pytest.raises(ConfigError, match="PendingCombine is not a PendingDispatch of this Runtime"):
        runtime.dispatch_recv(last)  # type: ignore[arg-type]


def check_max_in_flight(group: Bootstrap, nodes: tuple[int, ...]) -> None:
    """A full queue is waited for: ranks that fill it at different moments still pair their calls."""
    with open_runtime(group, nodes, max_in_flight=2) as runtime:
        work = workload_of("uniform", nodes)
        case = random_case(work, nodes, "grouped", torch.bfloat16, 8)

        def send() -> Any:
            return runtime.dispatch_send(case.xs[runtime.rank], work.topk_idx[runtime.rank], None)

        if runtime.rank == 3:
            sent = [send(), send()]
            assert_bits(runtime.dispatch_recv(sent.pop(0)).x, case.expected[runtime.rank].x, "in flight")
            sent.append(send())
        else:  # the third waits until rank 3 has let the first end
            sent = [send(), send(), send()]
        for pending in sent:
            assert_bits(runtime.dispatch_recv(pending).x, case.expected[runtime.rank].x, "in flight")
        runtime.barrier()


def check_inputs_outlive_the_caller(runtime: Runtime, nodes: tuple[int, ...]) -> None:
    """Arrays of an operation that nobody waits for are not freed while it runs: what comes after it is right."""
    work = workload_of("uniform", nodes)
    case = random_case(work, nodes, "grouped", torch.float32, 8)
    rank = runtime.rank
    got = case.dispatch(runtime)
    for _ in range(3):
        # Strided: the contiguous copy that is read belongs to nobody but the operation.
        strided = torch.stack([case.xs[rank], case.xs[rank]], dim=2)[:, :, 0]
        runtime.dispatch_send(strided, handle=got.handle)
        runtime.combine_send(expert_rows(rank, got.handle.num_rows, torch.float32, 1), got.handle)
    del strided
    churn = [torch.full((4096,), torch.nan) for _ in range(64)]
    runtime.barrier()
    assert all(bool(block.isnan().all()) for block in churn)
    case.combine(runtime, got, torch.float32, 9, is_weighted=True, has_grads=True)


def check_growth_and_close(group: Bootstrap, nodes: tuple[int, ...]) -> None:
    """An arena of one page grows; what it handed out outlives close() and the Runtime."""
    runtime = open_runtime(group, nodes, arena_bytes=4096)
    before = runtime.memory()
    assert before.arena_used_bytes == 0
    work = workload_of("skewed", nodes)
    case = random_case(work, nodes, "grouped", torch.float32, 128)
    results = [case.dispatch(runtime) for _ in range(3)]
    for got in results:
        case.check(runtime, got)
    out = case.combine(runtime, results[1], torch.float32, 3, is_weighted=True, has_grads=True)
    after = runtime.memory()
    num_bytes = sum(got.x.numel() * 4 for got in results)
    assert before.arena_bytes < 1 << 20 < num_bytes <= after.arena_used_bytes <= after.arena_bytes
    assert after.registered_bytes == before.registered_bytes
    copies = [out.clone(), *(got.x.clone() for got in results)]
    del results[1]
    runtime.close()
    runtime.close()
    with pytest.raises(ConfigError, match="this Runtime is closed"):
        runtime.barrier()
    del runtime, got
    gc.collect()
    assert_bits(out, copies[0], "combined, after close")
    for got, copy in zip(results, (copies[1], copies[3]), strict=True):
        assert_bits(got.x, copy, "dispatched, after close")
        got.x.zero_()  # still ours to write


def lifecycle_rank(port: int) -> None:
    rank = int(os.environ["COMMLIB_RANK"])
    group = part_of_job(port, rank, 4)
    for nodes, threads in (((0, 0, 1, 1), 1), ((0, 0, 0, 0), 2)):
        with open_runtime(group, nodes, num_threads=threads) as runtime:
            check_handles(runtime, nodes)
            check_halves(runtime, nodes)
            check_inputs_outlive_the_caller(runtime, nodes)
        check_max_in_flight(group, nodes)
        check_growth_and_close(group, nodes)
    group.close()


def test_handles_halves_and_memory() -> None:
    check_ranks(f"{HERE}:lifecycle_rank", 4, args=free_ports(1), timeout_s=200)
