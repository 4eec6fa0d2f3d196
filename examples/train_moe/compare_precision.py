"""What FP8 costs: the same training with routed experts in BF16, in FP8, and in FP8 without scales. From the root:

mpirun -n 2 python -m examples.train_moe.compare_precision

Same data, same seeds, real text. FP8 passes if its loss on held-out text, as a mean over the seeds, is within 0.5% of
BF16's; the run that forgets the scales has to be worse than that, or the comparison would prove nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commlib import bootstrap
from commlib.quant import Fp8Rows
from examples.train_moe.config import ModelConfig, TrainConfig
from examples.train_moe.data import held_out_windows, load_plays, split_plays
from examples.train_moe.parallel import connect
from examples.train_moe.train import Trainer

MARK = 0.005
KINDS = ("BF16", "FP8", "no scales")
MODEL = ModelConfig(expert_width=128)


def main() -> int:
    """0 if FP8 is as good as BF16 and wrong scales are not."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_moe.compare_precision", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--global-batch", type=int, default=16, help="sequences per step over all ranks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ranks = connect(arguments.device)
    try:
        losses = {kind: [held_out_loss(ranks, kind, seed, arguments) for seed in arguments.seeds] for kind in KINDS}
        return judge(losses)
    finally:
        dist.destroy_process_group()
        ranks.close()


def held_out_loss(ranks: bootstrap.Bootstrap, kind: str, seed: int, arguments: argparse.Namespace) -> float:
    """Nats per byte of held-out text after one training run."""
    training_text, held_out_text = split_plays(load_plays())
    config = TrainConfig(steps=arguments.steps, global_batch=arguments.global_batch, seed=seed)
    model_config = dataclasses.replace(MODEL, fp8_experts=kind != "BF16")
    with Trainer(ranks, model_config, config, training_text, torch.bfloat16, device=arguments.device) as trainer:
        if kind == "no scales":
            for layer in trainer.model.moe_layers():
                layer.experts.register_forward_pre_hook(before_experts)
                layer.experts.register_forward_hook(after_experts)
        for _ in trainer.train(config.steps):
            pass
        loss = trainer.held_out_loss(held_out_windows(held_out_text, config.seq_len))
    if ranks.rank == 0:
        print(f"{kind:>12}, seed {seed}: {loss:.4f} nats/byte after {config.steps} steps", flush=True)
    return loss


class _WrongScales(torch.autograd.Function):
    """Rows, and backwards gradient rows, whose scales were forgotten."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.view_as(rows) if not isinstance(rows, Fp8Rows) else _without_scales(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad if not isinstance(grad, Fp8Rows) else _without_scales(grad)


def _without_scales(rows: Fp8Rows) -> Fp8Rows:
    return Fp8Rows(rows.fp8, torch.ones_like(rows.scales), rows.dtype)


def before_experts(module: nn.Module, inputs: Any) -> Any:
    """Rows as dispatched, scales forgotten."""
    rows, *others = inputs
    return _WrongScales.apply(rows), *others  # type: ignore[no-untyped-call]


def after_experts(module: nn.Module, inputs: Any, output: Tensor) -> Any:
    """The same for the gradient rows that will be dispatched."""
    return _WrongScales.apply(output)  # type: ignore[no-untyped-call]


def judge(losses: dict[str, list[float]]) -> int:
    """Prints the comparison on rank 0."""
    means = {kind: sum(values) / len(values) for kind, values in losses.items()}
    apart = {kind: means[kind] / means["BF16"] - 1 for kind in KINDS[1:]}
    is_good = abs(apart["FP8"]) <= MARK < apart["no scales"]
    if dist.get_rank() == 0:
        for kind, share in apart.items():
            print(f"{kind:>12}: {means[kind]:.4f} nats/byte, {share:+.2%} against BF16's {means['BF16']:.4f}")
        print(f"{'PASS' if is_good else 'FAIL'}: FP8 within {MARK:.1%} of BF16, without scales worse")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
