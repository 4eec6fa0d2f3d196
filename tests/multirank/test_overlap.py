"""Overlapped layers compute the bits of plain ones, while rows really move. *_rank run on every rank."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import overlap_job as job
import pytest
import torch
from moe_job import free_ports, part_of_job, small_config, wait_for

from commlib import overlap
from commlib.runtime import Runtime
from commlib.testing.spawn import check_ranks
from commlib.topology import Topology

pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem
WAYS = {"sequential": job.sequential, "two batches": job.two_batches, "paired": job.paired}


def check_bits(runtime: Runtime, what: str, dtype: torch.dtype, **how: Any) -> None:
    layers = job.make_layers(runtime, 2, **how)
    batches = [job.make_inputs(runtime.rank, number, dtype) for number in range(4)]
    expected = job.plain(layers, batches)
    assert len(expected) == 4 + 2 * 6 + 4 * 2
    for name, way in WAYS.items():
        job.assert_same(way(layers, batches), expected, f"{what}, {name}")


def check_stages_of_different_length(runtime: Runtime) -> None:
    """A forward pass of three layers beside a backward pass of two others, and the other way round."""
    stages = job.make_layers(runtime, 3), job.make_layers(runtime, 2, seed=7)
    for ahead, behind in (stages, stages[::-1]):
        inputs = job.make_inputs(runtime.rank, 0), job.make_inputs(runtime.rank, 1)
        expected = [job.plain(layers, [state]) for layers, state in zip((ahead, behind), inputs, strict=True)]
        flows = {0: overlap.Flow(ahead, inputs[0]), 1: overlap.Flow(behind, inputs[1])}
        overlap.run(overlap.forward(len(behind), 1), flows)
        losses = {1: job.start_backward(flows[1])}
        overlap.run(overlap.forward_backward(len(ahead), len(behind)), flows)
        losses[0] = job.start_backward(flows[0])
        overlap.run(overlap.backward(len(ahead), 0), flows)
        for number, layers in enumerate((ahead, behind)):
            job.set_input_grads(flows[number], inputs[number])
            got = {"loss 0": losses[number]} | job.gradients(layers, [inputs[number]])
            job.assert_same(got, expected[number], f"{len(ahead)} beside {len(behind)} layers")


def check_in_flight(runtime: Runtime) -> None:
    """Every operation that the schedule puts beside computation ends during it: nobody waits in a receive."""
    layers = job.make_layers(runtime, 2)
    batches = [job.make_inputs(runtime.rank, number) for number in range(2)]
    flows = {number: overlap.Flow(layers, inputs) for number, inputs in enumerate(batches)}
    overlap.run(overlap.forward(2, 1), flows)
    job.start_backward(flows[1])
    num_seen = 0

    def see(piece: str) -> None:
        """Stays inside a piece of computation until everything under way has arrived."""
        nonlocal num_seen
        pending = [each.pending for flow in flows.values() for each in flow._passages if each.pending is not None]
        num_seen += len(pending)
        assert all(wait_for(each.is_finished) for each in pending), f"{piece}: rows wait for the receive"

    for layer in layers:
        layer.in_compute = see
    overlap.run(overlap.forward_backward(2, 2), flows)
    # In each of two layers combine(B) beside attention(F) and dispatch(B) beside mlp(F).
    assert num_seen == 4
    for layer in layers:
        del layer.in_compute  # a cycle


def check_no_grad(runtime: Runtime) -> None:
    layers, inputs = job.make_layers(runtime, 2), job.make_inputs(runtime.rank, 0)
    state = inputs
    for layer in layers:
        state = overlap.run_layer(layer, *state)
    with torch.no_grad():
        flow = overlap.Flow(layers, inputs)
        overlap.run(overlap.forward(2), {0: flow})
        assert flow.output_needs_grad == (False, False)
    for ours, theirs in zip(flow.take_outputs(), state, strict=True):
        assert torch.equal(ours, theirs)
    job.loss_of(state).backward()  # type: ignore[no-untyped-call]


def overlap_rank(port: int) -> None:
    rank = int(os.environ["COMMLIB_RANK"])
    torch.set_num_threads(1)
    group = part_of_job(port, rank, 2)
    config = small_config(num_experts=job.NUM_EXPERTS, num_topk=job.NUM_TOPK, timeout_s=20.0)
    with Runtime(group, config, topology=Topology((0, 1))) as runtime:
        start = runtime.memory().arena_used_bytes
        check_bits(runtime, "FP32", torch.float32)
        check_bits(runtime, "BF16", torch.bfloat16)
        check_bits(runtime, "FP8", torch.bfloat16, fp8="pow2", grad_fp8="fp32")
        check_bits(runtime, "FP8 kept", torch.bfloat16, fp8="pow2", grad_fp8="fp32", keep_fp8=True)
        check_stages_of_different_length(runtime)
        check_in_flight(runtime)
        check_no_grad(runtime)
        assert wait_for(lambda: runtime.memory().arena_used_bytes == start), "rows are kept for ever"
    group.close()


def test_overlapped_gradients_are_bitwise_the_plain_ones() -> None:
    check_ranks(f"{HERE}:overlap_rank", 2, args=free_ports(1), timeout_s=120)
