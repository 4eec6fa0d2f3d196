"""Train a small DeepSeek-V3 on Shakespeare. From the root of the repository:

python -m examples.train_moe
mpirun -n 4 python -m examples.train_moe
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from examples.train_moe import checkpoint
from examples.train_moe.bigram import bigram_loss, fit_bigram
from examples.train_moe.config import ModelConfig, ParallelConfig, TrainConfig
from examples.train_moe.data import HELD_OUT, held_out_windows, load_plays, split_plays
from examples.train_moe.faults import FAULTS, leave
from examples.train_moe.history import History
from examples.train_moe.parallel import connect
from examples.train_moe.plots import plot_load, plot_loss
from examples.train_moe.progress import Progress
from examples.train_moe.tracing import StepTrace
from examples.train_moe.train import Trainer

Config = TypeVar("Config", ModelConfig, TrainConfig, ParallelConfig)


def main() -> int:
    """0, or 1 when the model had to beat the bigram and did not; leaves with another status when a rank is lost."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    ranks = connect(arguments.device)
    try:
        training_text, held_out_text = split_plays(load_plays())
        config = from_arguments(TrainConfig, arguments)
        model_config = from_arguments(ModelConfig, arguments)
        parallel = from_arguments(ParallelConfig, arguments)
        windows = held_out_windows(held_out_text, config.seq_len)
        dtype = compute_dtype(arguments.dtype, arguments.device)
        with Trainer(ranks, model_config, config, training_text, dtype, parallel, arguments.device) as trainer:
            prepare(trainer, arguments)
            train(trainer, arguments)
            return report(trainer, training_text, windows, arguments)
    except FAULTS as fault:
        leave(ranks.rank, fault)
    finally:
        dist.destroy_process_group()
        ranks.close()


def parse_arguments() -> argparse.Namespace:
    """The command line: every field of the three configurations, and how to run."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_moe", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("out/train_moe"), help="metrics, pictures, checkpoints")
    run.add_argument("--resume", action="store_true", help="from the last checkpoint in --out; without: start afresh")
    run.add_argument("--checkpoint-every", type=int, default=0, metavar="STEPS", help="0: only after the last step")
    run.add_argument("--stop-at", type=int, metavar="STEP", help="stop early; the schedule still ends at --steps")
    run.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="of matmuls and of the wire")
    run.add_argument("--threads", type=int, default=1, help="torch threads per rank")
    run.add_argument("--log-every", type=int, default=10, metavar="STEPS")
    run.add_argument("--trace", type=int, default=0, metavar="STEPS", help="trace so many steps from the second on")
    run.add_argument("--require-beat-bigram", action="store_true", help="exit with 1 unless the model wins")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for title, config in (("model", ModelConfig), ("training", TrainConfig), ("parallel", ParallelConfig)):
        group = parser.add_argument_group(title)
        for field in dataclasses.fields(config):
            flag = "--" + field.name.replace("_", "-")
            if isinstance(field.default, bool):
                group.add_argument(flag, action="store_true", help=" ")
            else:
                group.add_argument(flag, type=type(field.default), default=field.default, help=" ")
    return parser.parse_args()


def from_arguments(config: type[Config], arguments: argparse.Namespace) -> Config:
    """A configuration from the arguments of the same names."""
    return config(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(config)})


def compute_dtype(choice: str, device: str) -> torch.dtype:
    """BF16 if asked for or, with "auto", if GPUs or the CPUs of all ranks multiply it natively; otherwise FP32."""
    if choice == "auto" and device == "cuda":
        return torch.bfloat16
    if choice != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[choice]
    capabilities = torch.cpu.get_capabilities()
    is_native = torch.tensor(int(capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)))
    dist.all_reduce(is_native, dist.ReduceOp.MIN)
    return torch.bfloat16 if is_native else torch.float32


def say(text: str) -> None:
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def prepare(trainer: Trainer, arguments: argparse.Namespace) -> None:
    """Describes the run and loads the last checkpoint if asked to."""
    model, runtime = trainer.model, trainer.runtime
    experts = sum(p.numel() for name, p in model.named_parameters() if name in trainer.first_expert)
    dense = sum(p.numel() for p in model.parameters()) - experts
    gate = model.config.gate
    say(runtime.describe())
    say(
        f"model: {dense + experts * runtime.num_ranks:,} parameters, {dense:,} of them not in routed experts; "
        f"{model.config.num_moe_layers} MoE layers (1 in the MTP module) of {gate.num_experts} routed experts, "
        f"top-{gate.num_topk} from at most {gate.max_groups} of {gate.num_groups} groups; {model.dtype}"
    )
    if not arguments.resume:
        checkpoint.discard(arguments.out / "checkpoints")
    elif found := checkpoint.latest(arguments.out / "checkpoints"):
        checkpoint.load(trainer, found)
        say(f"resumed from {found}")


def train(trainer: Trainer, arguments: argparse.Namespace) -> None:
    """Runs the remaining steps with progress, history and checkpoints."""
    until = min(arguments.steps, arguments.stop_at or arguments.steps)
    first = trainer.optimizer.num_steps
    is_main = dist.get_rank() == 0
    history = History(arguments.out / "metrics.jsonl", first) if is_main else None
    saver = checkpoint.BackgroundSaver()
    progress = Progress(trainer.config, first, until, is_shown=is_main, every=arguments.log_every)
    tracing = StepTrace(trainer, arguments.trace, arguments.out)
    started = time.perf_counter()
    for step in trainer.train(until):
        progress.show(step)
        if history:
            history.add(step)
        tracing.after_step()
        if arguments.checkpoint_every and (step.step + 1) % arguments.checkpoint_every == 0 and step.step + 1 < until:
            saver.start(trainer, arguments.out / "checkpoints")
    progress.close()
    tracing.finish()
    saver.wait()
    seconds = time.perf_counter() - started
    tokens = (until - first) * trainer.config.global_batch * trainer.config.seq_len
    say(f"trained {until - first} steps on {tokens:,} bytes in {seconds:.0f} s")
    if until > first:
        say(f"checkpoint: {checkpoint.save(trainer, arguments.out / 'checkpoints')}")


def report(trainer: Trainer, training_text: Tensor, windows: Tensor, arguments: argparse.Namespace) -> int:
    """Held-out loss against the bigram, pictures, exit status."""
    loss = trainer.held_out_loss(windows)
    with trainer.ema.applied():
        average_loss = trainer.held_out_loss(windows)
    bigram = bigram_loss(fit_bigram(training_text), windows)
    is_better = loss < bigram
    say(f"held out ({HELD_OUT}): {loss:.4f} nats/byte; with averaged weights {average_loss:.4f}")
    say(f"byte bigram on the same bytes: {bigram:.4f} nats/byte")
    say(
        f"{'PASS' if is_better else 'FAIL'}: the model is {abs(bigram - loss):.4f} nats/byte "
        f"{'better' if is_better else 'worse'} than the bigram"
    )
    if dist.get_rank() == 0:
        steps = History.read(arguments.out / "metrics.jsonl")
        plot_loss(steps, loss, bigram, arguments.out / "loss.png")
        plot_load(steps, arguments.out / "expert_load.png")
        say(f"pictures: {arguments.out / 'loss.png'}, {arguments.out / 'expert_load.png'}")
    return 1 if arguments.require_beat_bigram and not is_better else 0


if __name__ == "__main__":
    sys.exit(main())
