"""What the ranks of the tests in here share: a torch group, inputs of all ranks, the oracle's answers."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from multirank import moe_job
from torch import Tensor

from commlib import compat, reference
from commlib.testing.payloads import random_payload
from commlib.testing.workloads import Workload, make_workload

HIDDEN = 256
NUM_EXPERTS = 12
NUM_TOPK = 3
NUM_TOKENS = 19

deep_ep = compat.install()


@dataclass(frozen=True)
class Job:
    """This rank's place. `nodes` = the node of each rank."""

    group: Any
    rank: int
    size: int
    nodes: tuple[int, ...]
    device: torch.device

    def here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)


@contextmanager
def joined(store: str, device: str = "cpu") -> Iterator[Job]:
    """A torch group of all ranks, that meet at the file `store`. With device "cuda" ranks take GPUs in turn."""
    rank, size = int(os.environ["COMMLIB_RANK"]), int(os.environ["COMMLIB_WORLD_SIZE"])
    place = torch.device("cpu")
    if device == "cuda":
        place = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(place)
    per_node = int(os.environ.get("COMMLIB_RANKS_PER_NODE", size))
    dist.init_process_group(
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    yield Job(dist.group.WORLD, rank, size, tuple(r // per_node for r in range(size)), place)
    dist.barrier()
    dist.destroy_process_group()


def several(store: str, device: str, *targets: str) -> None:
    """Runs "module:function_rank" after one another on this rank: to start processes takes longer than most of them."""
    for number, target in enumerate(targets):
        print(f"-- {target}", flush=True)
        module, _, function = target.partition(":")
        getattr(importlib.import_module(f"compat.{module}"), function)(f"{store}-{number}", device)


@dataclass
class Case:
    """One routing with the inputs of all ranks, and what a rank receives by the oracle."""

    work: Workload
    xs: list[Tensor]
    layout: str
    alignment: int = 1
    fp8: str | None = None

    def __post_init__(self) -> None:
        self.expected = reference.dispatch(
            self.xs,
            self.work.topk_idx,
            self.work.topk_weights,
            self.work.num_experts,
            layout=self.layout,
            expert_alignment=self.alignment,
            fp8=self.fp8,
        )

    def again(self, seed: int, dtype: torch.dtype) -> Case:
        """The same routing with other rows, as gradients are."""
        xs = [random_payload(rank, len(x), x.shape[1], dtype, seed) for rank, x in enumerate(self.xs)]
        return Case(self.work, xs, self.layout, self.alignment)

    def expert_rows(self, seed: int, dtype: torch.dtype) -> list[Tensor]:
        """What the experts of each rank are taken to return; padding must not be read."""
        ys = []
        for rank, received in enumerate(self.expected):
            y = random_payload(rank, len(received.source), self.xs[0].shape[1], dtype, seed)
            y[received.source[:, 0] < 0] = torch.nan
            ys.append(y)
        return ys

    def combined(
        self, job: Job, ys: Sequence[Tensor], **options: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """What comes home to this rank by the oracle."""
        results = reference.combine(ys, self.expected, self.work.topk_idx, self.work.num_experts, job.nodes, **options)
        return results[job.rank]


def case_of(
    job: Job,
    name: str,
    layout: str = "rows",
    *,
    dtype: torch.dtype = torch.bfloat16,
    num_experts: int = NUM_EXPERTS,
    num_topk: int = NUM_TOPK,
    num_tokens: int = NUM_TOKENS,
    hidden: int = HIDDEN,
    seed: int = 0,
    **options: Any,
) -> Case:
    work = make_workload(
        name, num_ranks=job.size, num_experts=num_experts, num_topk=num_topk, num_tokens=num_tokens, seed=seed
    )
    xs = [random_payload(rank, count, hidden, dtype, seed) for rank, count in enumerate(work.num_tokens)]
    return Case(work, xs, layout, **options)


def weight_grads(rank: int, shape: Sequence[int], seed: int) -> Tensor:
    return moe_job.row_weights(rank, shape, seed)
