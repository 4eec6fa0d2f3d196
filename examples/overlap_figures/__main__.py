"""One forward pass beside one backward pass of MoE layers: in turn, overlapped, and without any communication.

    mpirun -n 2 python -m examples.overlap_figures
    mpirun -n 4 python -m examples.overlap_figures --device cuda --tokens 4096 --hidden 7168 --width 2048 --experts 256

All in one run, from the same weights and rows; the gradients of all ways are compared. "replaced by nothing" gives the
experts at once what communication would have brought, on GPUs also with `--num-sms` multiprocessors taken. "torch" is
permutations and all-to-all of torch.distributed. Times are medians of the slowest rank, on GPUs between events.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import commlib
from commlib import bootstrap, overlap, routing
from commlib.testing.torch_exchange import TorchExchange
from commlib.trace import overlap_of
from examples.choices import Choices
from examples.measuring import Stopwatch, gathered, relative_error, slowest_median
from examples.moe_layer import MoELayer
from examples.overlap_figures.occupied import occupied
from examples.overlap_figures.recorded import Recording, Replay
from examples.train_moe.parallel import connect
from examples.train_moe.torch_layer import run_layer_with_torch

Schedules = tuple[overlap.Schedule, ...]


def main() -> None:
    """Measure every way and print the table on rank 0."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    ranks = connect(arguments.device)
    try:
        if arguments.device == "cuda":
            torch.cuda.set_device(ranks.rank % torch.cuda.device_count())
        config = commlib.RuntimeConfig(
            hidden=arguments.hidden,
            num_experts=arguments.experts,
            num_topk=arguments.topk,
            max_tokens=arguments.tokens,
            expert_alignment=128,
            num_sms=arguments.num_sms,
        )
        with commlib.Runtime(ranks, config, device=arguments.device) as runtime:
            Figures(ranks, runtime, arguments).run()
    finally:
        dist.destroy_process_group()
        ranks.close()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.overlap_figures", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    sizes = (("tokens", 256), ("hidden", 256), ("width", 128), ("experts", 8), ("topk", 2), ("layers", 2))
    for name, default in (*sizes, ("num-sms", 20), ("iterations", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--fp8", action="store_true", help="rows, activations and matmuls of experts in FP8")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser.parse_args()


class ResidualLayer:
    """h -> h + shared(h) + routed(h), in the form that schedules take."""

    def __init__(self, layer: MoELayer, exchange: overlap.Exchange) -> None:
        self._layer, self.exchange = layer, exchange

    def attention(self, *state: Tensor) -> overlap.Attended:
        attended = self._layer.attention(*state)
        shared, _ = attended.kept
        return attended._replace(kept=(state[0], shared))

    def mlp(self, received: Any) -> Tensor:
        return self._layer.mlp(received)

    def finish(self, kept: overlap.State, combined: Tensor) -> overlap.State:
        h, shared = kept
        return (h + shared + combined,)


class Figures:
    """The same micro-batch again and again: forwards while the one before goes backwards."""

    def __init__(self, ranks: bootstrap.Bootstrap, runtime: commlib.Runtime, arguments: argparse.Namespace) -> None:
        self._ranks, self._runtime, self._arguments = ranks, runtime, arguments
        gate = routing.GateConfig(
            num_experts=arguments.experts, num_topk=arguments.topk, score_function="sigmoid", normalize=True
        )
        torch.manual_seed(ranks.rank)
        with torch.device(arguments.device):
            self._modules = [
                MoELayer(arguments.hidden, arguments.width, 1, gate, runtime, is_fp8=arguments.fp8)
                for _ in range(arguments.layers)
            ]
        x = torch.randn(arguments.tokens, arguments.hidden).to(arguments.device, torch.bfloat16)
        self._x, self._grad = x.requires_grad_(), torch.randn_like(x)
        self._recordings = [Recording(runtime) for _ in self._modules]
        self._expected: dict[str, Tensor] = {}
        self._times: dict[str, float] = {}

    def run(self) -> None:
        count, num_sms = self._arguments.layers, self._arguments.num_sms
        in_turn = (overlap.forward(count, 0), overlap.backward(count, 1))
        beside = (overlap.forward_backward(count, count),)
        real, recorded = self._layers(self._runtime), self._layers(*self._recordings)
        choices = Choices(self._modules)
        with choices.noted():
            self._expected = self._gradients(lambda: self._by_schedule(recorded, in_turn))
        replayed = self._layers(*(Replay(each) for each in self._recordings))
        self._show("overlapped", self._measure(lambda: self._by_schedule(real, beside)))
        self._show("in turn", self._measure(lambda: self._by_schedule(real, in_turn)))
        self._show("replaced by nothing", self._measure(lambda: self._by_schedule(replayed, beside)))
        if self._arguments.device == "cuda":
            seconds = self._measure(lambda: self._by_schedule(replayed, beside), lambda: occupied(num_sms))
            self._show(f"replaced by nothing, {num_sms} SMs taken", seconds)
        exposed = self._exposed_share(real, beside)
        if self._ranks.rank == 0:
            print(f"communication that no computation covers: {exposed:.1%} of the overlapped step", flush=True)
        if not self._arguments.fp8:
            exchange = TorchExchange(None, self._arguments.experts, 128)
            with choices.repeated():
                self._show("torch", self._measure(lambda: self._by_torch(exchange), is_exact=False))

    def _show(self, name: str, seconds: float) -> None:
        """At once: what follows may fail."""
        self._times[name] = seconds
        if self._ranks.rank == 0:
            ratio = f"{seconds / self._times['overlapped']:6.2f} x overlapped"
            print(f"{name:<40} {seconds * 1e3:10.3f} ms {ratio}", flush=True)

    # ---- ways

    def _layers(self, *runtimes: Any) -> list[ResidualLayer]:
        """With one runtime each, or one for all."""
        each = runtimes * len(self._modules) if len(runtimes) == 1 else runtimes
        return [
            ResidualLayer(module, dataclasses.replace(module.exchange, runtime=runtime))
            for module, runtime in zip(self._modules, each, strict=True)
        ]

    def _by_schedule(self, layers: list[ResidualLayer], schedules: Schedules) -> Iterator[None]:
        """Each step forwards one micro-batch and differentiates the one before; the first only forwards."""
        behind = overlap.Flow(layers, (self._x,))
        overlap.run(overlap.forward(len(layers), 1), {1: behind})
        while True:
            behind.take_outputs()
            behind.set_output_grads((self._grad,))
            yield
            ahead = overlap.Flow(layers, (self._x,))
            for schedule in schedules:
                overlap.run(schedule, {0: ahead, 1: behind})
            self._x.grad = behind.take_input_grads()[0]
            behind = ahead

    def _by_torch(self, exchange: TorchExchange) -> Iterator[None]:
        layers = self._layers(self._runtime)

        def forward() -> Tensor:
            state: overlap.State = (self._x,)
            for layer in layers:
                state = run_layer_with_torch(exchange, layer, *state)
            return state[0]

        behind = forward()
        while True:
            yield
            self._x.grad = None
            ahead = forward()
            behind.backward(self._grad)
            behind = ahead

    # ---- measuring

    def _gradients(self, way: Callable[[], Iterator[None]]) -> dict[str, Tensor]:
        """Of one step, on parameters that had none."""
        for module in self._modules:
            module.zero_grad()
        steps = way()
        next(steps)
        next(steps)
        found = {"x": self._x.grad}
        for place, module in enumerate(self._modules):
            found |= {f"{place}.{name}": each.grad for name, each in module.named_parameters()}
        return {name: grad.clone() for name, grad in found.items() if grad is not None}

    def _check(self, found: dict[str, Tensor], *, is_exact: bool) -> None:
        """Raises AssertionError unless gradients are as expected, to the bit or but for the order of BF16 sums."""
        assert found.keys() == self._expected.keys()
        for name, grad in found.items():
            expected = self._expected[name]
            if is_exact:
                assert torch.equal(grad, expected), name
            else:
                error = relative_error(grad, expected)
                assert error < 0.02, f"{name}: {error}"

    def _measure(
        self,
        way: Callable[[], Iterator[None]],
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        is_exact: bool = True,
    ) -> float:
        """Seconds of a step, after its gradients were compared."""
        self._check(self._gradients(way), is_exact=is_exact)
        steps = way()
        next(steps)
        next(steps)
        watch, times = Stopwatch(self._arguments.device), []
        with around():
            for _ in range(self._arguments.iterations):
                self._ranks.barrier(60)
                watch.mark()
                next(steps)
                watch.mark()
                times += watch.take()
        return slowest_median(self._ranks, times)

    def _exposed_share(self, layers: list[ResidualLayer], schedules: Schedules) -> float:
        """Of the step: communication outside of computation, mean over ranks."""
        steps = self._by_schedule(layers, schedules)
        next(steps)
        next(steps)
        self._ranks.barrier(60)
        recorder = self._runtime.start_trace()
        with recorder.step("overlapped"), recorder.compute("layers"):
            next(steps)
        spans = self._runtime.take_trace()
        found = overlap_of(spans)
        step_s = sum(each.end_s - each.begin_s for each in spans if each.lane == "step")
        shares = gathered(self._ranks, [(found.communication_s - found.hidden_s) / step_s])
        return sum(each[0] for each in shares) / len(shares)


if __name__ == "__main__":
    main()
