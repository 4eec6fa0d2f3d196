"""Train a small Megatron-Core GPT with MoE layers on Shakespeare, on commlib. From the root of the repository:

mpirun -n 4 python -m examples.megatron
torchrun --nproc-per-node 4 -m examples.megatron --dispatcher hybridep
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commlib import compat
from examples.megatron.model import Sizes, build_model, is_expert
from examples.megatron.without_cuda import use_cpu_in_place_of_cuda
from examples.train_moe.data import Batches, load_plays, split_plays
from examples.train_moe.parallel import connect

COMMLIB = ("deepep", "hybridep")
MEGATRON = ("alltoall", "allgather")


def main() -> int:
    """0, or 1 when the losses are not those of the reference."""
    arguments = parse_arguments()
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    ranks = connect()
    compat.install()  # from here on, `import deep_ep` finds commlib
    start_megatron(ranks.size)
    text, _ = split_plays(load_plays())
    try:
        losses = train(arguments.dispatcher, ranks, text, arguments)
        if arguments.reference == "none":
            return 0
        expected = train(arguments.reference, ranks, text, arguments)
        return compare(losses, expected, arguments, is_speaker=ranks.rank == 0)
    finally:
        dist.barrier()  # a rank that leaves early takes its memory from the others
        dist.destroy_process_group()
        ranks.close()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.megatron", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dispatcher", choices=COMMLIB, default="deepep", help="interface by which commlib is used")
    parser.add_argument(
        "--reference", choices=(*MEGATRON, "none"), default="alltoall", help="train again with this one"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--global-batch", type=int, default=8, help="sequences per step over all ranks")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def start_megatron(num_ranks: int) -> None:
    """Process groups: experts over all ranks, everything else replicated. Random numbers are not used."""
    use_cpu_in_place_of_cuda()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    parallel_state.initialize_model_parallel(expert_model_parallel_size=num_ranks)
    initialize_rng_tracker(inference_rng_tracker=True)  # one that needs no state of a GPU


def train(dispatcher: str, ranks: Any, text: Tensor, arguments: argparse.Namespace) -> list[float]:
    """The loss of every step, over all ranks."""
    sizes = Sizes()
    model = build_model(sizes, dispatcher, ranks.size, ranks.rank)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, betas=(0.9, 0.95), weight_decay=0.1)
    batches = Batches(
        text,
        seq_len=sizes.seq_len,
        global_batch=arguments.global_batch,
        rank=ranks.rank,
        num_ranks=ranks.size,
        seed=arguments.seed,
    )
    position = torch.arange(sizes.seq_len).expand(arguments.global_batch // ranks.size, -1)
    is_hidden = torch.ones(sizes.seq_len, sizes.seq_len, dtype=torch.bool).triu(1)[None, None]  # the future
    losses, started = [], time.monotonic()
    for step in range(arguments.steps):
        window = batches.next()
        tokens, labels = window[:, : sizes.seq_len], window[:, 1 : sizes.seq_len + 1]
        optimizer.zero_grad()
        loss = model(tokens.contiguous(), position, is_hidden, labels=labels.contiguous()).mean()
        loss.backward()
        finish_gradients(model, ranks.size)
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / ranks.size)
        if ranks.rank == 0 and (step % 5 == 0 or step == arguments.steps - 1):
            print(f"{dispatcher:<9} step {step:>3}: {losses[-1]:.6f} nats/byte", flush=True)
    if ranks.rank == 0:
        seconds = time.monotonic() - started
        print(f"{dispatcher:<9} {seconds / arguments.steps * 1e3:.0f} ms per step", flush=True)
    return losses


def finish_gradients(model: Any, num_ranks: int) -> None:
    """Means over all ranks' sequences. The backward pass brought experts the gradients of all ranks' tokens."""
    for parameter in model.parameters():
        if not is_expert(parameter):
            dist.all_reduce(parameter.grad)
        parameter.grad /= num_ranks


def compare(losses: list[float], expected: list[float], arguments: argparse.Namespace, *, is_speaker: bool) -> int:
    """PASS if every loss has the same bits."""
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    is_equal = losses == expected and losses[-1] < losses[0]
    if is_speaker:
        print(
            f"{'PASS' if is_equal else 'FAIL'}: {arguments.steps} losses on commlib ({arguments.dispatcher}) and with "
            f"{arguments.reference} differ by at most {worst:g}; {losses[0]:.4f} -> {losses[-1]:.4f}",
            flush=True,
        )
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
