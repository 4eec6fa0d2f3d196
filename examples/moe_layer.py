"""One MoE layer on commlib: a gate, shared experts that stay, routed experts that live on other ranks.

    python examples/moe_layer.py
    mpirun -n 4 python examples/moe_layer.py

Run as a script it does a forward and a backward pass on all ranks and compares outputs and gradients with the
same layer computed densely: every expert on every token, no communication.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import commlib
from commlib import overlap, routing
from commlib.experts import SwiGLUWeights, fp8_swiglu
from commlib.handle import Dispatched


class Linear(nn.Module):
    """`y = x W^T` in the dtype of x. The FP32 weight is the master copy; what the matmul sees is cast when it is used.

    The cast's backward brings the gradient back to FP32, so the optimizer never meets a low-precision weight.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return overlap.linear(x, self.weight)


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`: the dense feed-forward layer and the shared expert."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = Linear(hidden, width)
        self.up = Linear(hidden, width)
        self.down = Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class RoutedExperts(nn.Module):
    """The experts that live on this rank: global numbers `first_expert .. first_expert + num_local - 1`.

    Row e of each parameter is local expert e. With `is_fp8` all matmuls and all that is kept for the backward pass are
    in FP8; widths and alignment are multiples of 128 then.
    """

    def __init__(
        self, hidden: int, width: int, first_expert: int, num_local: int, alignment: int = 1, *, is_fp8: bool = False
    ) -> None:
        super().__init__()
        self.first_expert = first_expert
        self.alignment = alignment
        self.is_fp8 = is_fp8
        self.gate = nn.Parameter(torch.randn(num_local, width, hidden) * hidden**-0.5)
        self.up = nn.Parameter(torch.randn(num_local, width, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(num_local, hidden, width) * width**-0.5)

    def forward(self, x: Tensor, row_weights: Tensor, num_tokens_per_expert: tuple[int, ...]) -> Tensor:
        """x [rows, hidden] grouped by local expert, row_weights [rows] FP32 -> [rows, hidden], weighted.

        Each expert's rows are padded with zeros to a multiple of `alignment`; zeros stay zeros here.
        The routing weight is applied before the down projection: there its gradient needs no expert output kept.
        """
        padded = [-(-count // self.alignment) * self.alignment for count in num_tokens_per_expert]
        ends = torch.tensor(padded, device=x.device).cumsum(0, dtype=torch.int32)
        if self.is_fp8:
            return fp8_swiglu(x, row_weights, SwiGLUWeights(self.gate, self.up, self.down), ends)
        hidden = F.silu(overlap.grouped_linear(x, self.gate, ends)) * overlap.grouped_linear(x, self.up, ends)
        return overlap.grouped_linear(hidden * row_weights[:, None].to(x.dtype), self.down, ends)


class MoELayer(nn.Module):
    """`out = shared(x) + sum_k w_k expert_k(x)`, with the routed experts spread over the ranks of `runtime`.

    In pieces, so that a schedule of `commlib.overlap` can place the communication between them. Every rank has to run
    every forward and every backward pass, in the same order: both communicate.

    Attributes:
        bias: FP32 [num_experts], added to the scores to choose experts, never to weigh them; moved by the load, not by
            gradients.
        load: int64 [num_experts], tokens per expert over all ranks of the runtime since somebody set it to zero.
        choose: `routing.gate`, or what a comparison of runs puts in its place.
    """

    bias: Tensor

    def __init__(
        self,
        hidden: int,
        width: int,
        num_shared: int,
        gate: routing.GateConfig,
        runtime: commlib.Runtime,
        *,
        is_fp8: bool = False,
    ) -> None:
        super().__init__()
        num_local = gate.num_experts // runtime.num_ranks
        self.gate_config = gate
        self.choose: Callable[[Tensor, routing.GateConfig, Tensor], routing.GateOutput] = routing.gate
        self.exchange = overlap.Exchange(runtime=runtime)
        self.router = Linear(hidden, gate.num_experts)
        self.shared = SwiGLU(hidden, width * num_shared)
        alignment = runtime.config.expert_alignment
        self.experts = RoutedExperts(hidden, width, runtime.rank * num_local, num_local, alignment)
        self.use_fp8(is_fp8)
        self.register_buffer("bias", torch.zeros(gate.num_experts))
        self.load = torch.zeros(gate.num_experts, dtype=torch.int64, device="cpu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, hidden] -> ([tokens, hidden], affinities FP32 [tokens, num_experts])."""
        out, scores = overlap.run_layer(self, x)
        return out, scores

    def use_fp8(self, is_fp8: bool) -> None:
        """From now on: rows travel to the routed experts in FP8, as do gradients, and are multiplied in FP8, or not."""
        cast = "pow2" if is_fp8 else None
        self.exchange = dataclasses.replace(self.exchange, fp8=cast, grad_fp8=cast, keep_fp8=is_fp8)
        self.experts.is_fp8 = is_fp8

    def attention(self, *state: Tensor) -> overlap.Attended:
        """What comes before the experts of other ranks: the gate's choice, the shared expert."""
        (x,) = state
        chosen = self.choose(self.router(x.float()), self.gate_config, self.bias)
        return overlap.Attended(x, chosen.topk_idx, chosen.topk_weights, (self.shared(x), chosen.scores))

    def mlp(self, received: Dispatched) -> Tensor:
        """The experts of this rank on the rows that have come."""
        self.load += torch.tensor(received.handle.load())
        return self.experts(received.x, received.row_weights, received.num_tokens_per_expert)

    def finish(self, kept: overlap.State, combined: Tensor) -> overlap.State:
        """The sum of shared and routed experts."""
        shared, scores = kept
        return shared + combined, scores


def dense_reference(x: Tensor, layer: MoELayer, experts: RoutedExperts) -> Tensor:
    """The same layer without communication: all experts (`experts` holds them all) on all tokens, [tokens, hidden]."""
    routed = routing.gate(layer.router(x), layer.gate_config, layer.bias)
    hidden = F.silu(torch.einsum("th,ewh->etw", x, experts.gate)) * torch.einsum("th,ewh->etw", x, experts.up)
    outputs = torch.einsum("etw,ehw->teh", hidden, experts.down)
    weights = torch.zeros(x.shape[0], outputs.shape[1]).scatter(1, routed.topk_idx, routed.topk_weights)
    shared: Tensor = layer.shared(x)
    return shared + torch.einsum("teh,te->th", outputs, weights)


def main() -> None:
    """Compare outputs and gradients with the dense layer, on every rank: each computes all ranks' tokens densely."""
    tokens, hidden, width = 64, 64, 32
    gate = routing.GateConfig(num_experts=8, num_topk=4, score_function="sigmoid", num_groups=4, max_groups=2)
    config = commlib.RuntimeConfig(
        hidden=hidden,
        num_experts=gate.num_experts,
        num_topk=gate.num_topk,
        max_tokens=tokens,
        expert_alignment=1,
    )
    with commlib.Runtime(None, config) as runtime:
        torch.manual_seed(0)  # the same numbers on all ranks
        layer = MoELayer(hidden, width, num_shared=1, gate=gate, runtime=runtime)
        everyone = RoutedExperts(hidden, width, first_expert=0, num_local=gate.num_experts)
        first, num_local = layer.experts.first_expert, gate.num_experts // runtime.num_ranks
        my_experts = slice(first, first + num_local)
        my_tokens = slice(runtime.rank * tokens, (runtime.rank + 1) * tokens)
        for mine, all_experts in zip(layer.experts.parameters(), everyone.parameters(), strict=True):
            mine.data.copy_(all_experts.data[my_experts])
        all_x, all_grads = torch.randn(2, runtime.num_ranks * tokens, hidden)

        x = all_x[my_tokens].requires_grad_()
        out, _ = layer(x)
        got = [out, *torch.autograd.grad(out, [x, *layer.experts.parameters()], all_grads[my_tokens])]

        all_x = all_x.detach().requires_grad_()
        out = dense_reference(all_x, layer, everyone)
        x_grad, *expert_grads = torch.autograd.grad(out, [all_x, *everyone.parameters()], all_grads)
        want = [out[my_tokens], x_grad[my_tokens], *(grad[my_experts] for grad in expert_grads)]

        # FP32 sums of at most tokens x width terms, in another order.
        tolerance = 2**-23 * math.sqrt(runtime.num_ranks * tokens * width)
        for ours, reference in zip(got, want, strict=True):
            torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance * float(reference.detach().abs().max()))
        print(f"rank {runtime.rank} of {runtime.num_ranks}: output, input and expert gradients match the dense layer")


if __name__ == "__main__":
    main()
