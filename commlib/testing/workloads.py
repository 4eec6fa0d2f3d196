"""Named routings: which tokens of which rank go to which experts.

==================  ======================================================================================
name                routing
==================  ======================================================================================
uniform             every token picks `num_topk` different experts, all equally likely
skewed              experts are picked with Zipf probabilities 1 / (1 + position in a random order)
masked              uniform, then 30 % of the slots and all slots of every 8th token are -1
empty_rank          uniform; rank `num_ranks // 2` has no tokens
uneven              uniform; ranks have between 0 and `num_tokens` tokens
hot                 one expert is among the experts of every token
one_expert_per_rank uniform with as many experts as ranks
all_masked          every slot is -1
node_limited        every token picks its experts from at most `max_nodes` nodes
==================  ======================================================================================

Masked slots keep a weight that is not zero, so that code which forgets the mask is caught.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from commlib.errors import ConfigError
from commlib.topology import Topology

__all__ = ["WORKLOADS", "Workload", "make_workload"]

WORKLOADS = (
    "uniform",
    "skewed",
    "masked",
    "empty_rank",
    "uneven",
    "hot",
    "one_expert_per_rank",
    "all_masked",
    "node_limited",
)

_MASKED_FRACTION = 0.3
_MASKED_TOKEN_STRIDE = 8


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The routing of all ranks.

    Attributes:
        name: one of `WORKLOADS`.
        num_experts: experts over all ranks; differs from what was asked for in "one_expert_per_rank".
        num_topk: slots per token; at most `num_experts`.
        num_tokens: tokens of each rank.
        topk_idx: per rank int64 [num_tokens, num_topk], different experts, -1 = masked.
        topk_weights: per rank FP32 [num_tokens, num_topk], in (0, 1).
    """

    name: str
    num_experts: int
    num_topk: int
    num_tokens: tuple[int, ...]
    topk_idx: tuple[Tensor, ...]
    topk_weights: tuple[Tensor, ...]

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)


def _pick(rng: np.random.Generator, num_tokens: int, num_topk: int, log_weights: npt.NDArray[np.float64]) -> Tensor:
    """int64 [T, K]: different experts per token, drawn in proportion to exp(log_weights [E] or [T, E])."""
    # Gumbel's trick: the top k of log-probabilities plus Gumbel noise are a draw without replacement.
    noise = rng.gumbel(size=(num_tokens, log_weights.shape[-1]))
    order = np.argsort(-(noise + log_weights), axis=1, kind="stable")
    return torch.from_numpy(order[:, :num_topk].astype(np.int64))


def _limited(rng: np.random.Generator, num_tokens: int, num_topk: int, nodes: Sequence[int], max_nodes: int) -> Tensor:
    """int64 [T, K]: experts from `max_nodes` random nodes per token; `nodes` = the node of each expert."""
    of_expert = np.asarray(nodes)
    num_nodes = int(of_expert.max()) + 1
    sizes = sorted(np.bincount(of_expert).tolist())
    if max_nodes < 1 or sum(sizes[:max_nodes]) < num_topk:
        raise ConfigError(
            f"max_nodes={max_nodes} nodes can hold only {sum(sizes[: max(max_nodes, 0)])} experts, "
            f"a token needs num_topk={num_topk}"
        )
    chosen = rng.random((num_tokens, num_nodes)).argsort(axis=1).argsort(axis=1) < max_nodes
    return _pick(rng, num_tokens, num_topk, np.where(chosen[:, of_expert], 0.0, -np.inf))


def _token_counts(name: str, num_ranks: int, num_tokens: int, seed: int) -> tuple[int, ...]:
    if name == "empty_rank":
        return tuple(0 if rank == num_ranks // 2 else num_tokens for rank in range(num_ranks))
    if name == "uneven":
        rng = np.random.default_rng([seed, num_ranks])
        return tuple(int(count) for count in rng.integers(0, num_tokens + 1, size=num_ranks))
    return (num_tokens,) * num_ranks


def _check_sizes(num_ranks: int, num_experts: int, num_topk: int, num_tokens: int) -> None:
    if num_ranks < 1 or num_experts < 1 or num_experts % num_ranks:
        raise ConfigError(f"num_experts={num_experts} is not a positive multiple of num_ranks={num_ranks}")
    if not 1 <= num_topk <= num_experts:
        raise ConfigError(f"num_topk={num_topk} is not in 1..num_experts={num_experts}")
    if num_tokens < 0:
        raise ConfigError(f"num_tokens={num_tokens} is below 0")


def _log_weights(name: str, num_experts: int, seed: int) -> npt.NDArray[np.float64]:
    """How popular each expert is [E], on all ranks alike."""
    rng = np.random.default_rng([seed, 2**32 - 1])
    log_weights = np.zeros(num_experts)
    if name == "skewed":
        log_weights = -np.log1p(rng.permutation(num_experts).astype(np.float64))
    elif name == "hot":
        # Far above any Gumbel noise, so it is always picked (and comes first).
        log_weights[int(rng.integers(num_experts))] = 1e6
    return log_weights


def _mask(name: str, rng: np.random.Generator, idx: Tensor) -> Tensor:
    if name == "masked":
        idx[torch.from_numpy(rng.random(idx.shape) < _MASKED_FRACTION)] = -1
        idx[::_MASKED_TOKEN_STRIDE] = -1
    elif name == "all_masked":
        idx[:] = -1
    return idx


def make_workload(
    name: str,
    *,
    num_ranks: int,
    num_experts: int,
    num_topk: int,
    num_tokens: int,
    seed: int = 0,
    node_of_rank: Sequence[int] | None = None,
    max_nodes: int = 1,
) -> Workload:
    """The routing `name` (see the module's table), the same for the same arguments on every machine.

    Args:
        name: one of `WORKLOADS`.
        num_ranks: ranks.
        num_experts: experts over all ranks; "one_expert_per_rank" takes `num_ranks` instead.
        num_topk: slots per token; "one_expert_per_rank" takes `min(num_topk, num_ranks)`.
        num_tokens: tokens per rank; the most of a rank in "uneven".
        seed: of all random choices.
        node_of_rank: "node_limited" only: the node of each rank; None = each rank is a node.
        max_nodes: "node_limited" only.

    Raises:
        ConfigError: unknown name, or sizes that do not fit.
    """
    if name not in WORKLOADS:
        raise ConfigError(f"workload {name!r} is not one of {'|'.join(WORKLOADS)}")
    if name == "one_expert_per_rank":
        num_experts, num_topk = num_ranks, min(num_topk, num_ranks)
    _check_sizes(num_ranks, num_experts, num_topk, num_tokens)
    log_weights = _log_weights(name, num_experts, seed)
    nodes = Topology(tuple(range(num_ranks) if node_of_rank is None else node_of_rank)).node_of_expert(num_experts)
    counts = _token_counts(name, num_ranks, num_tokens, seed)
    idxs, weightss = [], []
    for rank, count in enumerate(counts):
        rng = np.random.default_rng([seed, rank])
        if name == "node_limited":
            idx = _limited(rng, count, num_topk, nodes, max_nodes)
        else:
            idx = _mask(name, rng, _pick(rng, count, num_topk, log_weights))
        idxs.append(idx)
        weightss.append(torch.from_numpy(rng.uniform(0.05, 0.95, idx.shape).astype(np.float32)))
    return Workload(
        name=name,
        num_experts=num_experts,
        num_topk=num_topk,
        num_tokens=counts,
        topk_idx=tuple(idxs),
        topk_weights=tuple(weightss),
    )
