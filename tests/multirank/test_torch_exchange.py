"""The baseline with torch.distributed against commlib: the same rows, sums and gradients. *_rank run on every rank."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from moe_job import HIDDEN, free_ports, small_config
from torch import Tensor

from commlib import ops
from commlib.bootstrap import connect
from commlib.cli.nccl_baseline import NcclBaseline, open_process_group
from commlib.cli.routed_rows import RoutedRows
from commlib.runtime import Runtime
from commlib.testing.spawn import check_ranks
from commlib.testing.torch_exchange import TorchExchange
from commlib.testing.workloads import make_workload

pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem
NUM_RANKS, NUM_EXPERTS, NUM_TOPK, ALIGNMENT = 3, 12, 3, 8


def same(runtime: Runtime, name: str, dtype: torch.dtype) -> None:
    work = make_workload(name, num_ranks=NUM_RANKS, num_experts=NUM_EXPERTS, num_topk=NUM_TOPK, num_tokens=40, seed=3)
    rank = runtime.rank
    idx = work.topk_idx[rank]
    generator = torch.Generator().manual_seed(rank)
    # Whole numbers: sums are exact, so order does not matter.
    x = torch.randint(-8, 9, (len(idx), HIDDEN), generator=generator).to(dtype)
    weights = torch.randint(1, 5, (len(idx), NUM_TOPK), generator=generator).float()
    grad = torch.randint(-4, 5, (len(idx), HIDDEN), generator=generator).to(dtype)
    exchange = TorchExchange(None, NUM_EXPERTS, ALIGNMENT)

    def run(is_ours: bool) -> list[Tensor]:
        x_in, w_in = x.clone().requires_grad_(), weights.clone().requires_grad_()
        if is_ours:
            got = ops.dispatch(runtime, x_in, idx, w_in, expert_alignment=ALIGNMENT)
            out = ops.combine(runtime, got.x * got.row_weights[:, None].to(dtype), got.handle)
        else:
            got = exchange.dispatch(x_in, idx, w_in)
            out = exchange.combine(got.x * got.row_weights[:, None].to(dtype), got.handle)
        out.backward(grad)
        assert x_in.grad is not None and w_in.grad is not None
        counts = torch.tensor([*got.num_tokens_per_expert, got.handle.num_rows, *got.handle.load()])
        return [got.x.detach(), got.row_weights.detach(), out.detach(), x_in.grad, w_in.grad, counts]

    names = ("rows", "row weights", "sums", "gradient of x", "gradient of the weights", "counts")
    for what, ours, theirs in zip(names, run(True), run(False), strict=True):
        used = (idx >= 0) if what == "gradient of the weights" else slice(None)
        assert torch.equal(ours[used], theirs[used]), f"{name}, {dtype}: {what}"


def exchange_rank(port: int) -> None:
    rank = int(os.environ["COMMLIB_RANK"])
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, NUM_RANKS, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    config = small_config(num_experts=NUM_EXPERTS, num_topk=NUM_TOPK, timeout_s=30.0)
    with Runtime(dist.group.WORLD, config) as runtime:
        for name in ("uniform", "masked", "uneven", "empty_rank"):
            for dtype in (torch.float32, torch.bfloat16):
                same(runtime, name, dtype)
    dist.destroy_process_group()


def baseline_rank() -> None:
    """The baseline of `commlib bench --nccl`, on CPUs over gloo: its checks pass, and fail for wrong rows."""
    from types import SimpleNamespace

    boot = connect()
    open_process_group(boot, "gloo")
    shape = SimpleNamespace(num_tokens=32, hidden=128, num_topk=4, num_experts=6)
    rows = RoutedRows(boot, torch.device("cpu"), shape, "uniform", 2, 1)
    config = SimpleNamespace(expert_alignment=ALIGNMENT)
    baseline = NcclBaseline(rows, shape.num_experts, ALIGNMENT)
    for which in range(2):
        got = baseline.check(which, config)
        with pytest.raises(AssertionError, match="summed rows"):
            rows.check_summed(which, baseline.combine(got._replace(row_weights=got.row_weights * 2)))
    dist.destroy_process_group()
    boot.close()


def test_baseline_of_the_benchmark() -> None:
    check_ranks(f"{HERE}:baseline_rank", NUM_RANKS, timeout_s=60)


def test_the_same_as_commlib() -> None:
    check_ranks(f"{HERE}:exchange_rank", NUM_RANKS, args=free_ports(1), timeout_s=120)
