"""Several nodes: what the ranks of the GPU tests do there. Nodes are simulated, ranks are plain processes."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from gpu.gpu_job import case_of, check_fp8, check_plain, open_runtime, workload_of
from gpu.gpu_modes_job import check_autograd, check_latency_regime
from row_cases import assert_bits

from commlib import cli, reference
from commlib.bootstrap import Bootstrap, connect
from commlib.config import RuntimeConfig
from commlib.errors import CommError, CommTimeout, ConfigError, PeerLostError
from commlib.launch_plan import combine_slot_bytes, dispatch_slot
from commlib.runtime import Runtime
from commlib.testing.workloads import WORKLOADS
from commlib.topology import Topology
from commlib.traffic import count_traffic

# Rings of a few rows of 256 columns, so that even a few tokens go round them several times.
SMALL = {"chunk_bytes": 4096, "ring_bytes": 16384}


def join() -> tuple[Bootstrap, torch.device]:
    """Like the one-node tests' join, without MPI: it may bring a UCX of its own."""
    boot = connect(None)
    device = torch.device("cuda", boot.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return boot, device


def plain_rank(names: list[str], hidden: int, num_tokens: int, options: dict[str, Any]) -> None:
    boot, device = join()
    for seed, name in enumerate(names or WORKLOADS):
        work = workload_of(name, boot.size, seed, num_tokens)
        with open_runtime(boot, device, work, hidden, max_tokens=max(128, num_tokens), **options) as runtime:
            assert runtime.topology.num_nodes > 1
            check_plain(runtime, work, hidden, (torch.bfloat16, torch.float32), seed)
    print(f"rank {boot.rank}: plain {names or WORKLOADS} hidden {hidden} OK", flush=True)


def rings_rank(expected: str) -> None:
    """Where rings lie, and that rows go through them; with device rings no processor has a way into host memory."""
    boot, device = join()
    work = workload_of("masked", boot.size)
    with open_runtime(boot, device, work, 256, **SMALL) as runtime:
        text = runtime.describe()
        print(f"rank {boot.rank}: {text}", flush=True)
        assert f"rings in {expected}" in text, text
        assert not any(f"{way}/" in text for way in ("cma", "xpmem", "knem")), text
        assert ("cuda_ipc/" in text) == (expected == "GPU memory" and "cuda_copy" not in os.environ["UCX_TLS"]), text
        check_plain(runtime, work, 256, (torch.bfloat16,), 0)


def rings_again_rank() -> None:
    boot, device = join()
    work = workload_of("uniform", boot.size)
    for seed in range(3):
        with open_runtime(boot, device, work, 256, **SMALL) as runtime:
            check_plain(runtime, work, 256, (torch.bfloat16,), seed)
    case = case_of(work, "grouped", 8, 256, torch.bfloat16)
    left = Runtime(boot, RuntimeConfig(hidden=256, num_experts=12, num_topk=3, num_sms=4), device=device)
    case.check(boot.rank, case.dispatch(left))
    torch.cuda.synchronize()
    boot.barrier(60)
    left._executor.abandon()
    boot.barrier(60)
    with open_runtime(boot, device, work, 256, **SMALL) as runtime:
        check_plain(runtime, work, 256, (torch.bfloat16,), 4)


def uneven_rank(node_of_rank: list[int]) -> None:
    """Two ranks behind two other nodes: their rows are added among themselves before they meet the sum."""
    plain_rank(["uniform", "hot"], 256, 37, {**SMALL, "topology": Topology(tuple(node_of_rank))})


def fp8_rank(names: list[str], hidden: int) -> None:
    boot, device = join()
    for name in names:
        work = workload_of(name, boot.size)
        with open_runtime(boot, device, work, hidden, **SMALL) as runtime:
            check_fp8(runtime, work, hidden)
    print(f"rank {boot.rank}: fp8 {names} hidden {hidden} OK", flush=True)


def bytes_rank() -> None:
    """One slot per token and other node, there and back, and not one byte more."""
    boot, device = join()
    work = workload_of("uniform", boot.size, num_tokens=64)
    hidden, topk = 1024, work.num_topk
    with open_runtime(boot, device, work, hidden) as runtime:
        traffic = count_traffic(runtime.topology, [idx.numpy() for idx in work.topk_idx], work.num_experts)[boot.rank]
        assert traffic.sent_out > 0 and traffic.received_out > 0
        moved = 0

        def expect(rows: float, slot_bytes: int) -> None:
            nonlocal moved
            moved += int(rows) * slot_bytes
            # The count follows the commands, which the proxy takes as they come.
            limit = time.monotonic() + 5
            while runtime.counters()["data_bytes"] != moved and time.monotonic() < limit:
                time.sleep(0.001)
            assert runtime.counters()["data_bytes"] == moved

        for fp8, element in ((None, 2), ("pow2", 1)):
            case = case_of(work, "grouped", 8, hidden, torch.bfloat16, fp8)
            got = case.dispatch(runtime)
            case.check(boot.rank, got)
            expect(traffic.sent_out, dispatch_slot(hidden, topk, element).slot_bytes)
            runtime.dispatch(case.xs[boot.rank].cuda(), handle=got.handle, fp8=fp8)
            expect(traffic.sent_out, hidden * element + (4 * (hidden // 128) if element == 1 else 0))
            case.combine(runtime, got, torch.bfloat16, 1, True, False)
            expect(traffic.received_out, combine_slot_bytes(hidden, topk, 2, has_grads=False))
            case.combine(runtime, got, torch.float32, 1, False, True)
            expect(traffic.received_out, combine_slot_bytes(hidden, topk, 4, has_grads=True))
        assert runtime.counters()["exchange_bytes"] > 0
    print(f"rank {boot.rank}: bytes OK", flush=True)


def modes_rank() -> None:
    """Sizes fixed by the caller, in a CUDA graph; overflow; halves; heaps that grow; refusals on another node."""
    boot, device = join()
    work = workload_of("masked", boot.size)
    rank, last = boot.rank, boot.size - 1
    with open_runtime(boot, device, work, 256, **SMALL) as runtime:
        case = case_of(work, "grouped", 8, 256, torch.bfloat16)
        x, idx, weights = case.xs[rank].cuda(), work.topk_idx[rank].cuda(), work.topk_weights[rank].cuda()
        ys = [received.x * 2 for received in case.expected]
        nodes = list(runtime.topology.node_of_rank)
        combined = reference.combine(ys, case.expected, work.topk_idx, work.num_experts, nodes)[rank][0]
        rows = len(case.expected[rank].source)

        def both() -> tuple[torch.Tensor, torch.Tensor]:
            got = runtime.dispatch(x, idx, weights, expert_alignment=8, capacity=512)
            return got.x, runtime.combine(got.x * 2, got.handle).x

        both()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            received, out = both()
        for _ in range(3):
            out.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert_bits(received[:rows], case.expected[rank].x, "graph: dispatch")
            assert_bits(out, combined, "graph: combine")
        assert int(runtime.overflowed()) == 0
        got = runtime.dispatch(x, idx, weights, expert_alignment=8, capacity=8)
        assert torch.isnan(runtime.combine(got.x, got.handle).x).all() and int(runtime.overflowed()) == 1
        runtime.check()
    with open_runtime(boot, device, work, 256, arena_bytes=1 << 16, **SMALL) as runtime:
        bad = idx.clone()
        if rank == last:
            bad[5, 1] = 99
        with pytest.raises(ConfigError, match=f"rank {last}: expert id 99 at token 5, slot 1 on rank {last}"):
            runtime.dispatch(x, bad, weights)
        sent = runtime.dispatch_send(x, idx, weights, expert_alignment=8)
        got = runtime.dispatch_recv(sent)
        case.check(rank, got)
        for node, count in enumerate(got.handle.num_tokens_per_node()[rank]):
            ranks = runtime.topology.ranks_of_node(node)
            owners = torch.where(work.topk_idx[rank] < 0, -1, work.topk_idx[rank] // (work.num_experts // boot.size))
            assert count == int(torch.isin(owners, torch.tensor(ranks)).any(dim=1).sum())
        pending = runtime.combine_send(got.x * 2, got.handle)
        assert_bits(runtime.combine_recv(pending).x, combined, "halves: combine")
    print(f"rank {boot.rank}: modes OK", flush=True)


def latency_rank() -> None:
    boot, device = join()
    check_latency_regime(boot, device)
    print(f"rank {boot.rank}: latency OK", flush=True)


def loads_rank() -> None:
    """One Runtime, calls whose rows want other numbers of forwarders: all, none, few, all again."""
    boot, device = join()
    names = ("uniform", "local", "masked", "hot", "uniform")
    works = [
        workload_of("uniform" if name == "local" else name, boot.size, seed, 61) for seed, name in enumerate(names)
    ]
    for name, work in zip(names, works, strict=True):
        if name == "local":  # nothing crosses the network
            for rank, idx in enumerate(work.topk_idx):
                per_rank = work.num_experts // boot.size
                idx.copy_(torch.where(idx < 0, idx, rank * per_rank + torch.arange(idx.shape[1]) % per_rank))
    topology = Topology((0, 0, 1, 2))
    with open_runtime(boot, device, works[0], 256, **{**SMALL, "num_sms": 12, "topology": topology}) as runtime:
        assert runtime._executor.tiers.plan.most_in_blocks > 1
        for seed, work in enumerate(works):
            check_plain(runtime, work, 256, (torch.bfloat16,), seed)
    print(f"rank {boot.rank}: loads OK", flush=True)


def bench_rank(arguments: list[str]) -> None:
    """`commlib bench` checks what it measures."""
    assert cli.main(["bench", "--device", "cuda", "--num-sms", "4", "--iterations", "1", *arguments]) == 0


def timeout_rank() -> None:
    """A rank that stays away: its rail times out, and every rank of both nodes hears of it."""
    boot, device = join()
    work = workload_of("uniform", boot.size)
    case = case_of(work, "grouped", 8, 256, torch.bfloat16)
    last = boot.size - 1
    config = RuntimeConfig(
        hidden=256, num_experts=12, num_topk=3, max_tokens=128, timeout_s=2.0, heartbeat_timeout_s=30.0, num_sms=4
    )
    runtime = Runtime(boot, config, device=device)
    if boot.rank != last:
        start = time.monotonic()
        with pytest.raises(CommTimeout, match="in exchange") as caught:
            case.dispatch(runtime)
        assert caught.value.peer == last and time.monotonic() - start < 30
    boot.barrier(60)
    if boot.rank == last:
        with pytest.raises(CommError):
            case.dispatch(runtime)
    runtime.close()
    boot.barrier(60)
    with open_runtime(boot, device, work, 256) as again:
        case.check(boot.rank, case.dispatch(again))
    print(f"rank {boot.rank}: timeout OK", flush=True)


def lost_rank() -> None:
    """A rank whose process dies between operations."""
    boot, device = join()
    work = workload_of("uniform", boot.size)
    case = case_of(work, "grouped", 8, 256, torch.bfloat16)
    config = RuntimeConfig(
        hidden=256, num_experts=12, num_topk=3, max_tokens=128, timeout_s=60.0, heartbeat_timeout_s=2.0, num_sms=4
    )
    runtime = Runtime(boot, config, device=device)
    case.check(boot.rank, case.dispatch(runtime))
    torch.cuda.synchronize()
    if boot.rank == boot.size - 1:
        os._exit(0)
    start = time.monotonic()
    with pytest.raises(PeerLostError) as caught:
        case.dispatch(runtime)
    assert caught.value.peer == boot.size - 1 and time.monotonic() - start < 30
    runtime.close()
    print(f"rank {boot.rank}: lost OK", flush=True)


def autograd_rank() -> None:
    boot, device = join()
    check_autograd(boot, device)
