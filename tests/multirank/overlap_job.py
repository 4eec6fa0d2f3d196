"""What the ranks of the overlap tests share: a small MoE layer in pieces, overlapped and plain runs of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from moe_job import HIDDEN, assert_bits
from torch import Tensor, nn

from commlib import overlap, routing
from commlib.handle import Dispatched
from commlib.layout import align_up
from commlib.runtime import Runtime
from commlib.testing.payloads import random_payload

NUM_EXPERTS, NUM_TOPK, ALIGNMENT = 8, 2, 8
GATE = routing.GateConfig(num_experts=NUM_EXPERTS, num_topk=NUM_TOPK, score_function="sigmoid")


class SmallLayer(nn.Module):
    """Norm, projection, gate, shared expert; routed experts with two matrices; two residual additions.

    Carries a second state tensor along and adds it in, so that gradients of several paths meet.
    """

    def __init__(self, exchange: overlap.Exchange, seed: int) -> None:
        super().__init__()
        self.exchange = exchange
        num_local = NUM_EXPERTS // exchange.runtime.num_ranks
        first = exchange.runtime.rank * num_local
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * shape[-1] ** -0.5)

        self.gain, self.project, self.router = weight(HIDDEN), weight(HIDDEN, HIDDEN), weight(NUM_EXPERTS, HIDDEN)
        self.shared = weight(HIDDEN, HIDDEN)
        up, down = weight(NUM_EXPERTS, 16, HIDDEN), weight(NUM_EXPERTS, HIDDEN, 16)
        self.up, self.down = (nn.Parameter(each.data[first : first + num_local].clone()) for each in (up, down))

    def in_compute(self, piece: str) -> None:
        """For tests to replace."""

    def attention(self, *state: Tensor) -> overlap.Attended:
        self.in_compute("attention")
        h, carried = state
        h = h + overlap.linear(F.rms_norm(h, (HIDDEN,), self.gain.to(h.dtype)), self.project)
        x = F.rms_norm(h, (HIDDEN,))
        chosen = routing.gate(overlap.linear(x.float(), self.router), GATE)
        kept = (h, carried, overlap.linear(x, self.shared))
        return overlap.Attended(x, chosen.topk_idx, chosen.topk_weights, kept)

    def mlp(self, received: Dispatched) -> Tensor:
        self.in_compute("mlp")
        ends = torch.tensor([align_up(n, ALIGNMENT) for n in received.num_tokens_per_expert]).cumsum(0).int()
        hidden = F.silu(overlap.grouped_linear(received.x, self.up, ends))
        return overlap.grouped_linear(hidden * received.row_weights[:, None].to(hidden.dtype), self.down, ends)

    def finish(self, kept: overlap.State, combined: Tensor) -> overlap.State:
        h, carried, shared = kept
        return h + (shared + combined), carried + 0.5 * combined


def make_layers(runtime: Runtime, count: int, seed: int = 0, **how: Any) -> list[SmallLayer]:
    exchange = overlap.Exchange(runtime=runtime, expert_alignment=ALIGNMENT, **how)
    return [SmallLayer(exchange, seed + number) for number in range(count)]


def make_inputs(rank: int, batch: int, dtype: torch.dtype = torch.float32, num_tokens: int = 24) -> overlap.State:
    """Rank 1 has fewer tokens, in batch 2 none."""
    count = num_tokens if rank != 1 else (7, 5, 0)[batch % 3]
    first, second = (random_payload(rank, count, HIDDEN, dtype, seed=10 * batch + part) for part in (1, 2))
    return first.requires_grad_(), second.requires_grad_()


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    return outputs[0].float().square().sum() + outputs[1].float().sin().sum()


def plain_step(layers: Sequence[SmallLayer], inputs: overlap.State) -> Tensor:
    """Forward and backward without a schedule; returns the loss."""
    state = inputs
    for layer in layers:
        state = overlap.run_layer(layer, *state)
    loss = loss_of(state)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def start_backward(flow: overlap.Flow) -> Tensor:
    """Between a flow's forward and its backward steps; returns the loss."""
    outputs = [each.requires_grad_() for each in flow.take_outputs()]
    loss = loss_of(outputs)
    flow.set_output_grads(torch.autograd.grad(loss, outputs))
    return loss.detach()


def gradients(layers: Iterable[nn.Module], inputs: Iterable[overlap.State]) -> dict[str, Tensor]:
    """By name; taken away from the parameters and inputs."""
    found = {}
    for place, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, name
            found[f"layer {place} {name}"], parameter.grad = parameter.grad, None
    for place, state in enumerate(inputs):
        for part, each in enumerate(state):
            assert each.grad is not None
            found[f"input {place}.{part}"], each.grad = each.grad, None
    return found


def set_input_grads(flow: overlap.Flow, inputs: overlap.State) -> None:
    for each, grad in zip(inputs, flow.take_input_grads(), strict=True):
        each.grad = grad


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_bits(tensor, theirs[name], f"{what}: {name}")


def plain(layers: Sequence[SmallLayer], batches: Sequence[overlap.State]) -> dict[str, Tensor]:
    """Losses and gradients of micro-batches one after the other."""
    losses = {f"loss {number}": plain_step(layers, inputs) for number, inputs in enumerate(batches)}
    return losses | gradients(layers, batches)


def sequential(layers: Sequence[SmallLayer], batches: Sequence[overlap.State]) -> dict[str, Tensor]:
    """The schedules without a partner; half of the gradients of weights are left for later."""
    losses = {}
    for number, inputs in enumerate(batches):
        flow = overlap.Flow(layers, inputs)
        overlap.run(overlap.forward(len(layers)), {0: flow})
        losses[f"loss {number}"] = start_backward(flow)
        overlap.run(overlap.backward(len(layers), with_weights=number % 2 == 0), {0: flow})
        for work in flow.take_weight_work():
            work()
        set_input_grads(flow, inputs)
    return losses | gradients(layers, batches)


def two_batches(layers: Sequence[SmallLayer], batches: Sequence[overlap.State]) -> dict[str, Tensor]:
    """Two micro-batches at a time in the same layer."""
    losses = {}
    for first in range(0, len(batches), 2):
        flows = {number: overlap.Flow(layers, batches[number]) for number in (first, first + 1)}
        overlap.run(overlap.two_batches_forward(len(layers), (first, first + 1)), flows)
        losses |= {f"loss {number}": start_backward(flow) for number, flow in flows.items()}
        overlap.run(overlap.two_batches_backward(len(layers), (first, first + 1)), flows)
        for number, flow in flows.items():
            set_input_grads(flow, batches[number])
    return losses | gradients(layers, batches)


def paired(layers: Sequence[SmallLayer], batches: Sequence[overlap.State]) -> dict[str, Tensor]:
    """The forward pass of each micro-batch beside the backward pass of the one before."""
    flows = {number: overlap.Flow(layers, inputs) for number, inputs in enumerate(batches)}
    losses, count = {}, len(layers)
    for number, flow in flows.items():
        if number == 0:
            overlap.run(overlap.forward(count, number), flows)
        else:
            both = partial(overlap.forward_backward, forward_batch=number, backward_batch=number - 1)
            overlap.run(both(count, count), flows)
        losses[f"loss {number}"] = start_backward(flow)
    overlap.run(overlap.backward(count, len(batches) - 1), flows)
    for number, inputs in enumerate(batches):
        set_input_grads(flows[number], inputs)
    return losses | gradients(layers, batches)
