"""What commlib brings to a whole training step, against the same model on torch.distributed. From the root:

    mpirun -n 2 python -m examples.train_moe.compare_dispatch
    mpirun -n 2 python -m examples.train_moe.compare_dispatch --device cuda --tokens 4096 --hidden 7168 --width 2048 \
        --experts 64 --topk 8 --heads 128 --q-rank 1536 --kv-rank 512 --nope-dim 128 --rope-dim 64 --v-dim 128

A step is that of `Trainer`: forward and backward passes of some micro-batches, sums of gradients, clipping, AdamW; but
no averaged weights, which are the host's work. The ways to take one share weights, optimizer and data and take turns;
the first is permutations and all-to-all of torch.distributed (NCCL on GPUs, gloo on CPUs) around the same products of
the experts. Losses and gradients of all ways are compared before. Times are medians of the slowest rank.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from commlib import bootstrap, overlap
from commlib.testing.torch_exchange import TorchExchange
from examples.choices import Choices
from examples.measuring import Stopwatch, gathered, relative_error, slowest_median
from examples.train_moe.config import ModelConfig, ParallelConfig, TrainConfig
from examples.train_moe.model import Losses
from examples.train_moe.parallel import connect
from examples.train_moe.torch_layer import run_layer_with_torch
from examples.train_moe.train import Trainer


class Way(NamedTuple):
    """How a step is taken. `overlap`: see ParallelConfig; None stands for the one that was asked for."""

    name: str
    exchange: str
    is_fp8: bool
    overlap: str | None


WAYS = (
    Way("torch all_to_all, BF16, in turn", "torch", False, "none"),
    Way("commlib, BF16, in turn", "commlib", False, "none"),
    Way("commlib, BF16, overlapped", "commlib", False, None),
    Way("commlib, FP8, in turn", "commlib", True, "none"),
    Way("commlib, FP8, overlapped", "commlib", True, None),
)
TORCH, BF16, BF16_OVERLAPPED, FP8, FP8_OVERLAPPED = WAYS


def main(words: Sequence[str] | None = None) -> None:
    """Compare results, take turns, print the table on rank 0."""
    arguments = parse_arguments(words)
    torch.set_num_threads(1)
    ranks = connect(arguments.device)
    try:
        if arguments.device == "cuda":
            torch.cuda.set_device(ranks.rank % torch.cuda.device_count())
            # The MTP module's projection is large and FP32: without tensor cores it would outweigh the layers.
            torch.set_float32_matmul_precision("high")
        with make_trainer(ranks, arguments) as trainer:
            comparison = Comparison(ranks, trainer, arguments)
            comparison.check()
            comparison.measure()
    finally:
        dist.destroy_process_group()
        ranks.close()


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_moe.compare_dispatch", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    sizes = (
        ("tokens", 128, "of a micro-batch, per rank"),
        ("sequences", 1, "into which they are cut"),
        ("micro-batches", 2, "of a step, an even number"),
        ("layers", 2, "MoE layers, that of the MTP module included"),
        ("dense-layers", 0, "before them"),
        ("hidden", 128, ""),
        ("width", 128, "of an expert"),
        ("experts", 8, "over all ranks"),
        ("topk", 4, ""),
        ("dense-width", 384, ""),
        ("heads", 4, ""),
        *((name, getattr(ModelConfig, name.replace("-", "_")), "") for name in ATTENTION),
        ("num-sms", 24, "multiprocessors of commlib's kernels"),
        ("turns", 5, "that are measured"),
        ("seed", 1, ""),
    )
    for name, default, meaning in sizes:
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning or " ")
    parser.add_argument("--overlap", choices=("batches", "pairs"), default="batches", help="of the overlapped ways")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args(words)
    if arguments.tokens % arguments.sequences or arguments.micro_batches % 2:
        parser.error("sequences divide tokens, and micro-batches are an even number")
    return arguments


ATTENTION = ("q-rank", "kv-rank", "nope-dim", "rope-dim", "v-dim")


class MarkingTrainer(Trainer):
    """Tells time between the backward passes and what comes after them."""

    watch: Stopwatch | None = None

    def add_gradients(self) -> list[Losses]:
        losses = super().add_gradients()
        if self.watch is not None:
            self.watch.mark()
        return losses


def make_trainer(ranks: bootstrap.Bootstrap, arguments: argparse.Namespace) -> MarkingTrainer:
    """One for all ways: weights, gradients and moments are there once."""
    model_config = ModelConfig(
        hidden=arguments.hidden,
        num_layers=arguments.dense_layers + arguments.layers - 1,
        num_dense_layers=arguments.dense_layers,
        dense_width=arguments.dense_width,
        num_heads=arguments.heads,
        **{name: getattr(arguments, name) for name in (each.replace("-", "_") for each in ATTENTION)},
        bf16_attention=True,
        num_experts=arguments.experts,
        num_topk=arguments.topk,
        num_groups=1,
        max_groups=1,
        expert_width=arguments.width,
        fp8_experts=True,  # rows of experts are padded as FP8 wants them, in all ways: the products have one shape
    )
    config = TrainConfig(
        steps=1000,
        warmup_steps=1,
        global_batch=ranks.size * arguments.micro_batches * arguments.sequences,
        seq_len=arguments.tokens // arguments.sequences,
        lr=1e-4,
        final_lr=1e-4,
        ema_decay=0.0,
        seed=arguments.seed,
        draw_on_device=True,
    )
    generator = torch.Generator().manual_seed(arguments.seed)
    text = torch.randint(256, (2 * config.global_batch * config.seq_len + 2,), generator=generator, dtype=torch.uint8)
    parallel = ParallelConfig(micro_batches=arguments.micro_batches, num_sms=arguments.num_sms)
    return MarkingTrainer(ranks, model_config, config, text, torch.bfloat16, parallel, arguments.device)


class Comparison:
    """The ways of `WAYS` to make the same step."""

    def __init__(self, ranks: bootstrap.Bootstrap, trainer: MarkingTrainer, arguments: argparse.Namespace) -> None:
        self._ranks, self._trainer, self._arguments = ranks, trainer, arguments
        self._data = trainer.batches.state()
        self._choices = Choices(trainer.model.moe_layers())
        alignment = trainer.model.config.expert_alignment
        self._torch = TorchExchange(trainer.grid.row_group(), arguments.experts, alignment)

    # ---- results

    def check(self) -> None:
        """Gradients of all ways, from the same weights and data and with the same choices of experts.

        Raises:
            AssertionError: two ways differ by more than their bound; on all ranks.
        """
        with self._choices.noted():
            expected = self._results(BF16)
        num_layers = self._arguments.layers + self._arguments.dense_layers
        # Overlap changes no bit; but on GPUs attention's backward pass adds in any order.
        is_exact = self._arguments.device == "cpu"
        with self._choices.repeated():
            self._compare(self._results(TORCH), expected, TORCH, BF16, bound(num_layers))
            again = 0.0 if is_exact else bound(num_layers)
            self._compare(self._results(BF16_OVERLAPPED), expected, BF16_OVERLAPPED, BF16, again)
            before, expected = expected, self._results(FP8)
            self._compare(expected, before, FP8, BF16, bound(num_layers, num_fp8=1))
            del before
            again = 0.0 if is_exact else bound(num_layers, num_fp8=2)
            self._compare(self._results(FP8_OVERLAPPED), expected, FP8_OVERLAPPED, FP8, again)

    def _results(self, way: Way) -> dict[str, Tensor]:
        """Losses, and this rank's gradients, which nobody else holds any more."""
        self._set(way)
        losses = self._trainer.add_gradients()
        found = {"losses": torch.stack([torch.stack(each) for each in losses])}
        for name, parameter in self._trainer.parameters.items():
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
        return found

    def _compare(
        self, found: dict[str, Tensor], expected: dict[str, Tensor], way: Way, other: Way, limit: float
    ) -> None:
        """Prints the largest distance; all ranks find the same."""
        assert found.keys() == expected.keys()
        names = list(found)
        errors = gathered(self._ranks, [relative_error(found[name], expected[name]) for name in names])
        # NaN is larger than everything.
        worst = {
            name: max(each, key=lambda error: math.inf if math.isnan(error) else error)
            for name, each in zip(names, zip(*errors, strict=True), strict=True)
        }
        bad = {name: error for name, error in worst.items() if not error <= limit}
        assert not bad, f"{way.name}, against {other.name}: {bad}, the bound is {limit}"
        name = max(worst, key=worst.__getitem__)
        self._say(f"{way.name}: within {worst[name]:.2g} of {other.name} (bound {limit:.2g}), most in {name}")

    # ---- times

    def measure(self) -> None:
        """All ways in turn, another one first each time; the first turn is not measured."""
        watch = self._trainer.watch = Stopwatch(self._arguments.device)
        steps = self._trainer.train(self._trainer.config.steps)
        laps: dict[str, list[list[float]]] = {way.name: [] for way in WAYS}
        with self._choices.repeated():
            for turn in range(1 + self._arguments.turns):
                first = turn % len(WAYS)
                for way in (*WAYS[first:], *WAYS[:first]):
                    self._set(way)
                    self._ranks.barrier(60)
                    watch.mark()
                    next(steps)
                    watch.mark()
                    taken = watch.take()
                    if turn > 0:
                        laps[way.name].append(taken)
        self._show(laps)

    def _show(self, laps: dict[str, list[list[float]]]) -> None:
        arguments, num_ranks = self._arguments, self._ranks.size
        is_cuda = arguments.device == "cuda"
        self._say(
            f"{num_ranks} ranks, {torch.cuda.get_device_name() if is_cuda else 'CPU'}; "
            f"a step: {arguments.micro_batches} micro-batches of {arguments.tokens} tokens a rank; "
            f"{arguments.layers} MoE layers of {arguments.experts} experts, top-{arguments.topk}, "
            f"hidden {arguments.hidden}, width {arguments.width}; dense layers: {arguments.dense_layers}; "
            f"overlap: {arguments.overlap}"
        )
        self._say(f"{'':32} {'ms/step':>10} {'tokens/s':>12} {'ratio':>6} {'ms, passes alone':>17} {'ratio':>6}")
        first: tuple[float, float] | None = None
        for name, each in laps.items():
            step_s = slowest_median(self._ranks, [sum(lap) for lap in each])
            passes_s = slowest_median(self._ranks, [lap[0] for lap in each])
            first = first or (step_s, passes_s)
            tokens = num_ranks * arguments.micro_batches * arguments.tokens / step_s
            self._say(
                f"{name:32} {step_s * 1e3:10.2f} {tokens:12,.0f} {first[0] / step_s:6.2f} "
                f"{passes_s * 1e3:17.2f} {first[1] / passes_s:6.2f}"
            )
        if is_cuda:
            held = torch.cuda.max_memory_reserved() + self._trainer.runtime.memory().arena_bytes
            self._say(f"memory: {held / 2**30:.1f} GiB on rank 0, the allocator's most and commlib's heap")

    def _set(self, way: Way) -> None:
        """The next step goes this way, on the same data as all others."""
        trainer = self._trainer
        trainer.batches.restore(self._data)
        trainer.parallel = dataclasses.replace(trainer.parallel, overlap=way.overlap or self._arguments.overlap)
        by_torch = partial(run_layer_with_torch, self._torch)
        trainer.model.run_layer = by_torch if way.exchange == "torch" else overlap.run_layer
        for layer in trainer.model.moe_layers():
            layer.use_fp8(way.is_fp8)

    def _say(self, text: str) -> None:
        if self._ranks.rank == 0:
            print(text, flush=True)


def bound(num_layers: int, num_fp8: int = 0) -> float:
    """Largest relative distance of a gradient between two ways, `num_fp8` of them with experts in FP8.

    A cast to BF16 errs by at most 2^-8, in the square mean 2^-8 / sqrt(3) or less, independently of others. In each
    layer the longest way leads forwards past 17: norm, q_down, q_norm, q_up, rotation, probabilities, their product
    with v, out; norm, gate, SwiGLU's three products, down, a rank's sum, that of all ranks, the shared expert; and
    backwards past as many. Only sums are in another order, but what differs a little is rounded differently ever after:
    both ways err by themselves. A cast to FP8 errs by at most 2^-4, and there are 12 in a layer: rows, three weights,
    inner rows, two kept inputs, gradients of y and of the two inputs, two re-tilings.
    """
    bf16, fp8 = 2 * (2 * 17) * num_layers * 2**-16 / 3, num_fp8 * 12 * num_layers * 2**-8 / 3
    return (bf16 + fp8) ** 0.5


if __name__ == "__main__":
    main()
