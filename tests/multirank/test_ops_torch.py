"""commlib.ops under torch.utils.checkpoint and torch.compile, on real ranks. *_rank run on every rank."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_job import HIDDEN, assert_bits, config_of, free_ports, part_of_job, wait_for
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from commlib import ops
from commlib.errors import ConfigError
from commlib.handle import Handle
from commlib.runtime import Runtime
from commlib.testing.payloads import random_payload
from commlib.testing.spawn import check_ranks
from commlib.testing.workloads import make_workload
from commlib.topology import Topology

pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem
WORK = make_workload("skewed", num_ranks=2, num_experts=4, num_topk=2, num_tokens=11)

Leaves = tuple[Tensor, Tensor, Tensor, Tensor]  # x, routing weights, the experts' two matrices


def leaves(rank: int) -> Leaves:
    x = random_payload(rank, WORK.num_tokens[rank], HIDDEN, torch.float32, seed=1)
    up, down = (random_payload(rank, HIDDEN, HIDDEN, torch.float32, seed=seed) / 16 for seed in (2, 3))
    x, weights, up, down = (each.clone().requires_grad_() for each in (x, WORK.topk_weights[rank], up, down))
    return x, weights, up, down


def moe(runtime: Runtime, x: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The same matrices for all experts of a rank."""
    d = ops.dispatch(runtime, torch.tanh(x), WORK.topk_idx[runtime.rank], weights, expert_alignment=8)
    y = torch.relu(d.x @ up) @ down * d.row_weights[:, None]
    return x + ops.combine(runtime, y, d.handle)


def results(runtime: Runtime, layer: Callable[..., Tensor]) -> list[Tensor]:
    """Output and gradients of two layers, one after the other."""
    x, weights, up, down = leaves(runtime.rank)
    out = layer(layer(x, weights, up, down), weights, up, down)
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None and weights.grad is not None and up.grad is not None and down.grad is not None
    return [out.detach(), x.grad, weights.grad, up.grad, down.grad]


def rows_pushed(runtime: Runtime, call: Callable[[], list[Tensor]]) -> tuple[list[Tensor], int, int]:
    """What `call` returns, and the rows that dispatches and combines moved meanwhile."""
    before = runtime.counters()["roles"]
    got = call()
    after = runtime.counters()["roles"]
    dispatched, combined = (
        after[name]["rows"] - before.get(name, {"rows": 0})["rows"] for name in ("push", "final_reduce")
    )
    return got, dispatched, combined


def check_checkpoint(runtime: Runtime) -> None:
    """The same bits; recomputation moves rows again unless the policy keeps them."""
    start = runtime.memory().arena_used_bytes
    layer = partial(moe, runtime)
    expected, dispatched, combined = rows_pushed(runtime, lambda: results(runtime, layer))
    selective = partial(create_selective_checkpoint_contexts, ops.save_communication)
    cases: list[tuple[str, dict[str, Any], bool]] = [
        ("reentrant", {"use_reentrant": True}, True),
        ("not reentrant", {"use_reentrant": False, "early_stop": False}, True),
        ("communication saved", {"use_reentrant": False, "context_fn": selective}, False),
    ]
    for what, options, is_moved_again in cases:
        layer = partial(checkpoint, partial(moe, runtime), **options)
        got, again, combined_again = rows_pushed(runtime, partial(results, runtime, layer))
        for name, ours, theirs in zip(("out", "x", "weights", "up", "down"), got, expected, strict=True):
            assert_bits(ours, theirs, f"{what}: {name}")
        # Two layers, two operations of each kind a layer (forward and backward); recomputation adds one of each.
        factor = 1.5 if is_moved_again else 1
        assert (again, combined_again) == (factor * dispatched, factor * combined), what
        gc.collect()  # cycles of torch's own
        assert wait_for(lambda: runtime.memory().arena_used_bytes == start), f"{what}: rows are kept for ever"


def check_compile(runtime: Runtime) -> None:
    """The same bits, and two breaks of the graph, where the layer communicates."""
    expected = results(runtime, partial(moe, runtime))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    layer = torch.compile(partial(moe, runtime), backend="aot_eager")
    for what in ("compiled", "compiled, second call"):
        for name, ours, theirs in zip(
            ("out", "x", "weights", "up", "down"), results(runtime, layer), expected, strict=True
        ):
            assert_bits(ours, theirs, f"{what}: {name}")
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert len(breaks) == 2, breaks  # places; recompiled functions break at the same ones
    assert all("all ranks issue communication in one order" in reason for reason in breaks), breaks
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3
    both = partial(checkpoint, layer, use_reentrant=False, early_stop=False)
    for ours, theirs in zip(results(runtime, both), expected, strict=True):
        assert_bits(ours, theirs, "compiled and checkpointed")


def check_wrong_types(runtime: Runtime) -> None:
    """What torch's schema would refuse on one rank alone is refused on all of them, and the next call works."""
    idx, weights = WORK.topk_idx[runtime.rank], WORK.topk_weights[runtime.rank]
    x, is_wrong = torch.zeros(len(idx), HIDDEN), runtime.rank == 1
    good: dict[str, Any] = {"x": x, "topk_idx": idx, "topk_weights": weights}
    for changes, message in (
        ({"x": x.numpy()}, "x is a ndarray, not a torch tensor"),
        ({"topk_idx": idx.tolist()}, "topk_idx is a list"),
        ({"topk_idx": idx.numpy()}, "topk_idx is a ndarray"),
        ({"topk_weights": weights.numpy()}, "topk_weights is a ndarray"),
        ({"fp8": 1}, "fp8=1 is not"),
        ({"expert_alignment": "8"}, "expert_alignment='8' is not"),
        ({"expert_alignment": True}, "expert_alignment=True is not"),
        ({"capacity": 2**70}, f"capacity={2**70} is not"),
    ):
        with pytest.raises(ConfigError, match=f"rank 1: {message}"):
            ops.dispatch(runtime, **good | (changes if is_wrong else {}))
    got = ops.dispatch(runtime, **good)
    plain = Handle(got.handle._native, got.handle.layout, got.handle._runtime_id)
    good = {"y": got.x, "handle": got.handle, "weights": got.row_weights}
    for changes, message in (
        ({"y": got.x.detach().numpy()}, "y is a ndarray"),
        ({"y": None}, "y is a NoneType"),
        ({"weights": got.row_weights.detach().numpy()}, "weights is a ndarray"),
        ({"handle": plain}, "ops.combine needs the handle of ops.dispatch, not a Handle"),
    ):
        with pytest.raises(ConfigError, match=f"rank 1: {message}"):
            ops.combine(runtime, **good | (changes if is_wrong else {}))
    assert_bits(ops.combine(runtime, **good), torch.zeros_like(x), "after refusals")


def ops_torch_rank(port: int) -> None:
    group = part_of_job(port, int(os.environ["COMMLIB_RANK"]), 2)
    with Runtime(group, config_of(WORK, timeout_s=20.0), topology=Topology((0, 0))) as runtime:
        check_wrong_types(runtime)
        gc.collect()  # errors' frames hold rows
        check_checkpoint(runtime)
        check_compile(runtime)
    group.close()


def test_checkpoint_and_compile() -> None:
    check_ranks(f"{HERE}:ops_torch_rank", 2, args=free_ports(1), timeout_s=120)
