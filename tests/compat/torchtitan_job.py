"""torchtitan's DeepEP client, the file from its wheels, on commlib. Functions named *_rank run on every rank.

All numbers are whole or binary fractions, and small: sums are exact, so results are compared bit by bit with a dense
computation, whatever the order of summation.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock
from zipfile import ZipFile

import torch
from compat.compat_job import Job, joined
from torch import Tensor

NUM_EXPERTS = 8
NUM_TOPK = 3
NUM_TOKENS = 13
HIDDEN = 64


def load_client(version: str, device: str) -> Any:
    """torchtitan/distributed/deepep/deepep.py of a release. It registers its operators for CUDA, or where we are."""
    wheel = Path(sys.prefix) / "clients" / f"torchtitan-{version}-py3-none-any.whl"
    if not wheel.exists():
        raise FileNotFoundError(f"{wheel} is missing: launch/setup downloads it")
    with ZipFile(wheel) as archive:
        source = archive.read("torchtitan/distributed/deepep/deepep.py")
    client = ModuleType("torchtitan_deepep")
    sys.modules[client.__name__] = client
    register = torch.library.impl

    def register_here(*arguments: Any) -> Any:
        return register(*(device.upper() if argument == "CUDA" else argument for argument in arguments))

    with mock.patch.object(torch.library, "impl", register_here):
        exec(compile(source, str(wheel), "exec"), client.__dict__)
    return client


def numbers(seed: int, *shape: int) -> Tensor:
    """Whole numbers from -3 to 3."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def routing(rank: int) -> tuple[Tensor, Tensor]:
    """Experts, and scores 0, 1/4, 1/2, 3/4; a score of 0 says "nowhere"."""
    generator = torch.Generator().manual_seed(rank + 50)
    order = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator).argsort(dim=1)
    scores = torch.randint(0, 4, (NUM_TOKENS, NUM_TOPK), generator=generator) / 4
    return order[:, :NUM_TOPK].contiguous(), scores


class Dense:
    """The same computation without any dispatch, over the tokens of all ranks."""

    def __init__(self, num_ranks: int) -> None:
        self.xs = [numbers(rank, NUM_TOKENS, HIDDEN).requires_grad_() for rank in range(num_ranks)]
        self.scores = [routing(rank)[1].requires_grad_() for rank in range(num_ranks)]
        self.weights = [numbers(expert + 99, HIDDEN, HIDDEN).requires_grad_() for expert in range(NUM_EXPERTS)]
        self.factors = [numbers(rank + 200, NUM_TOKENS, HIDDEN) for rank in range(num_ranks)]
        self.outs = []
        for rank, (x, scores) in enumerate(zip(self.xs, self.scores, strict=True)):
            experts = torch.stack([x @ weight for weight in self.weights], dim=1)
            idx = routing(rank)[0][:, :, None].expand(-1, -1, HIDDEN)
            self.outs.append((experts.gather(1, idx) * scores[:, :, None]).sum(dim=1))
        sum((out * factor).sum() for out, factor in zip(self.outs, self.factors, strict=True)).backward()


def grouped(rows: Tensor, counts: Tensor, weights: list[Tensor]) -> Tensor:
    """The experts; rows behind the last count belong to nobody."""
    parts = rows[: int(counts.sum())].split(counts.tolist())
    done = torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])
    return torch.cat([done, torch.zeros_like(rows[len(done) :])])


def equal(actual: Tensor | None, expected: Tensor | None, what: str) -> None:
    assert actual is not None and expected is not None, what
    assert torch.equal(actual.cpu(), expected), f"{what}: off by {float((actual.cpu() - expected).abs().max())}"


def train(job: Job, client: Any, dispatch: Any) -> None:
    """One step; outputs and all gradients."""
    dense, local = Dense(job.size), NUM_EXPERTS // job.size
    mine = range(job.rank * local, (job.rank + 1) * local)
    x = dense.xs[job.rank].detach().to(job.device).requires_grad_()
    scores = dense.scores[job.rank].detach().to(job.device).requires_grad_()
    weights = [dense.weights[expert].detach().to(job.device).requires_grad_() for expert in mine]
    rows, counts, state = dispatch(x, job.here(routing(job.rank)[0]), scores)
    out = client.combine_tokens(grouped(rows, counts, weights), state)
    client.sync_combine()
    (out * job.here(dense.factors[job.rank])).sum().backward()
    equal(out.detach(), dense.outs[job.rank].detach(), "output")
    equal(x.grad, dense.xs[job.rank].grad, "gradient of x")
    expected = dense.scores[job.rank].grad
    assert expected is not None
    # The client sends no token to an expert of score 0, so nobody knows that score's gradient.
    equal(scores.grad, torch.where(dense.scores[job.rank] == 0, 0.0, expected), "gradient of the scores")
    for expert, weight in zip(mine, weights, strict=True):
        equal(weight.grad, dense.weights[expert].grad, f"gradient of expert {expert}")
    assert not client._handle_cache, "handles are left behind"


def first_version_rank(store: str, device: str = "cpu") -> None:
    with joined(store, device) as job:
        client = load_client("0.2.2", device)
        for score_first in (True, False):

            def dispatch(x: Tensor, idx: Tensor, scores: Tensor, score_first: bool = score_first) -> Any:
                return client.dispatch_tokens(
                    x, idx, scores, NUM_EXPERTS // job.size, NUM_EXPERTS, job.group, score_before_experts=score_first
                )

            train(job, client, dispatch)


def second_version_rank(store: str, device: str = "cpu") -> None:
    with joined(store, device) as job:
        client = load_client("0.3.0", device)
        for num_max_tokens in (4, NUM_TOKENS):  # the second call needs a larger buffer than the first
            buffer = client.get_buffer(
                job.group, hidden=HIDDEN, num_max_tokens_per_rank=num_max_tokens, num_topk=NUM_TOPK
            )
        assert buffer.num_max_tokens_per_rank == NUM_TOKENS

        def dispatch(x: Tensor, idx: Tensor, scores: Tensor) -> Any:
            return client.dispatch_tokens(
                x,
                idx,
                scores,
                NUM_EXPERTS // job.size,
                NUM_EXPERTS,
                num_tokens_per_rank=NUM_TOKENS,
                cudagraphable=True,  # asks for the static layout, which the client takes without gradients only
            )

        train(job, client, dispatch)
        dense, local = Dense(job.size), NUM_EXPERTS // job.size
        weights = [job.here(weight.detach()) for weight in dense.weights[job.rank * local : (job.rank + 1) * local]]
        with torch.no_grad():
            x, scores = dense.xs[job.rank].detach(), dense.scores[job.rank].detach()
            rows, counts, state = dispatch(job.here(x), job.here(routing(job.rank)[0]), job.here(scores))
            assert state.cudagraphable and len(rows) == job.size * NUM_TOKENS * min(NUM_TOPK, local)
            out = client.combine_tokens(grouped(rows, counts, weights), state)
            client.sync_combine()
        equal(out, dense.outs[job.rank].detach(), "inference")
        assert not client._handle_cache, "handles are left behind"
