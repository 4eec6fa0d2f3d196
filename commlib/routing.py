"""The gate: affinities, group-limited top-k, routing weights, load balancing. No token is ever dropped.

Formulas: DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2: equations 13 to 16 for the gate, 17 to 20 for
the sequence-wise balance loss, "auxiliary-loss-free load balancing" for the bias and "node-limited routing" for the
groups. A group stands for a node there; `GateConfig.group_of_expert` takes `Topology.node_of_expert` for real nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from commlib.errors import ConfigError

__all__ = [
    "SCORE_FUNCTIONS",
    "GateConfig",
    "GateOutput",
    "affinity",
    "dispatch_layout",
    "expert_load",
    "gate",
    "select_experts",
    "sequence_balance_loss",
    "topk",
    "update_bias",
    "weigh_experts",
]

SCORE_FUNCTIONS = ("sigmoid", "softmax")


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How tokens choose experts.

    Attributes:
        num_experts: experts in all.
        num_topk: experts per token.
        score_function: "sigmoid" (each expert by itself) or "softmax" (over all experts).
        num_groups: number of contiguous groups of equal size.
        max_groups: most groups from which one token takes experts; None = no limit.
        group_of_expert: the group of each expert, instead of `num_groups`: for nodes that hold uneven expert counts.
        normalize: whether a token's weights are divided by their sum.
        route_scale: factor on the weights (2.5 in DeepSeek-V3).

    Raises:
        ConfigError: a value breaks a rule, or some choice of `max_groups` groups holds fewer than `num_topk` experts.
    """

    num_experts: int
    num_topk: int
    score_function: str = "sigmoid"
    num_groups: int = 1
    max_groups: int | None = None
    group_of_expert: tuple[int, ...] | None = None
    normalize: bool = True
    route_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_topk <= self.num_experts:
            raise ConfigError(f"num_topk={self.num_topk} is not in 1..num_experts={self.num_experts}")
        if self.score_function not in SCORE_FUNCTIONS:
            raise ConfigError(f"score_function={self.score_function!r} is not one of {'|'.join(SCORE_FUNCTIONS)}")
        if not (math.isfinite(self.route_scale) and self.route_scale > 0):
            raise ConfigError(f"route_scale={self.route_scale} is not a finite number > 0")
        if self.group_of_expert is None:
            if self.num_groups < 1 or self.num_experts % self.num_groups:
                raise ConfigError(f"num_experts={self.num_experts} is not divisible by num_groups={self.num_groups}")
        else:
            self._take_groups(self.group_of_expert)
        if self.max_groups is None:
            return
        if self.max_groups < 1:
            raise ConfigError(f"max_groups={self.max_groups} is below 1")
        # A token's groups depend on its scores, so even the smallest ones must do.
        sizes = sorted(len(members) for members in self.groups)
        fewest = sum(sizes[: self.max_groups])
        if fewest < self.num_topk:
            raise ConfigError(
                f"max_groups={self.max_groups} groups can hold only {fewest} experts (group sizes {sizes}), "
                f"a token needs num_topk={self.num_topk}"
            )

    def _take_groups(self, group_of_expert: Sequence[int]) -> None:
        groups = tuple(int(group) for group in group_of_expert)
        if len(groups) != self.num_experts:
            raise ConfigError(f"group_of_expert has {len(groups)} entries, num_experts={self.num_experts}")
        num_groups = max(groups) + 1
        if set(groups) != set(range(num_groups)):
            found = sorted(set(groups))
            raise ConfigError(f"group_of_expert names groups {found}, the rule: each of 0..{num_groups - 1}")
        if self.num_groups not in (1, num_groups):
            raise ConfigError(f"num_groups={self.num_groups} contradicts the {num_groups} groups of group_of_expert")
        object.__setattr__(self, "group_of_expert", groups)
        object.__setattr__(self, "num_groups", num_groups)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The experts of each group, ascending."""
        of_expert = self.group_of_expert
        if of_expert is None:
            size = self.num_experts // self.num_groups
            return tuple(tuple(range(group * size, (group + 1) * size)) for group in range(self.num_groups))
        members: list[list[int]] = [[] for _ in range(self.num_groups)]
        for expert, group in enumerate(of_expert):
            members[group].append(expert)
        return tuple(map(tuple, members))

    @property
    def is_limited(self) -> bool:
        """Whether `max_groups` excludes anything."""
        return self.max_groups is not None and self.max_groups < self.num_groups


class GateOutput(NamedTuple):
    """What `gate` returns: `topk_idx` int64 [T, K], `topk_weights` FP32 [T, K], `scores` FP32 [T, E]."""

    topk_idx: Tensor
    topk_weights: Tensor
    scores: Tensor


def affinity(logits: Tensor, score_function: str) -> Tensor:
    """Affinities of tokens for experts, always computed in FP32.

    Args:
        logits: [T, E], any floating dtype: token times expert centroid.
        score_function: "sigmoid" (equation 15) or "softmax".

    Returns:
        FP32 [T, E].
    """
    if score_function == "sigmoid":
        return torch.sigmoid(logits.float())
    if score_function == "softmax":
        return torch.softmax(logits.float(), dim=-1)
    raise ConfigError(f"score_function={score_function!r} is not one of {'|'.join(SCORE_FUNCTIONS)}")


def topk(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of the last axis, descending; equal values in ascending order of index.

    `torch.topk` leaves the choice among equal values open, which would let two ranks route one token differently.

    Returns:
        (values [..., k], indices int64 [..., k]).
    """
    if not 0 <= k <= values.shape[-1]:
        raise ConfigError(f"k={k} is not in 0..{values.shape[-1]}")
    ordered, indices = torch.sort(values, dim=-1, descending=True, stable=True)
    return ordered[..., :k], indices[..., :k]


def _check_experts(name: str, tensor: Tensor, num_experts: int) -> None:
    if tensor.ndim != 2 or tensor.shape[1] != num_experts:
        raise ConfigError(f"{name} has shape {list(tensor.shape)}, the rule: [tokens, num_experts={num_experts}]")


def _chosen_groups(biased: Tensor, config: GateConfig) -> Tensor:
    """bool [T, G]: the groups from which each token may take experts."""
    assert config.max_groups is not None
    num_summed = -(-config.num_topk // config.max_groups)
    columns = []
    for members in config.groups:
        inside = biased[:, list(members)]
        columns.append(topk(inside, min(num_summed, len(members)))[0].sum(dim=-1))
    group_scores = torch.stack(columns, dim=-1)
    chosen = topk(group_scores, config.max_groups)[1]
    return torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, chosen, True)


def select_experts(scores: Tensor, config: GateConfig, bias: Tensor | None = None) -> Tensor:
    """The experts of each token: the top `num_topk` of `scores + bias` inside the token's groups.

    A token's groups are the `max_groups` whose best `ceil(num_topk / max_groups)` biased affinities have the largest
    sum (section 2.1.2, "node-limited routing"). Equal values go to the lower group and the lower expert.

    Args:
        scores: FP32 [T, E], affinities.
        config: the gate.
        bias: [E] or None; it selects, and never reaches the weights.

    Returns:
        int64 [T, K], in descending order of biased affinity.
    """
    _check_experts("scores", scores, config.num_experts)
    biased = scores.detach()
    if bias is not None:
        if tuple(bias.shape) != (config.num_experts,):
            raise ConfigError(f"bias has shape {list(bias.shape)}, the rule: [num_experts={config.num_experts}]")
        biased = biased + bias.detach().float()
    order = topk(biased, config.num_experts)[1]
    if config.is_limited:
        group_of_expert = torch.empty(config.num_experts, dtype=torch.int64, device=scores.device)
        for group, members in enumerate(config.groups):
            group_of_expert[list(members)] = group
        excluded = ~_chosen_groups(biased, config)[:, group_of_expert].gather(1, order)
        # A second stable sort moves excluded experts behind the others. Masking with -inf would not tell them from
        # experts whose own affinity is -inf.
        order = order.gather(1, torch.sort(excluded.to(torch.uint8), dim=-1, stable=True)[1])
    return order[:, : config.num_topk].contiguous()


def gate(logits: Tensor, config: GateConfig, bias: Tensor | None = None) -> GateOutput:
    """Routes tokens (equations 13 to 16): weights are the UNBIASED affinities of the selected experts.

    With `config.normalize`, weights are divided by their sum; a token whose selected affinities are all zero gets equal
    weights. `config.route_scale` multiplies them. The gradient reaches `logits` through the affinities alone: selection
    and bias carry none.

    Args:
        logits: [T, E].
        config: the gate.
        bias: [E] or None.
    """
    _check_experts("logits", logits, config.num_experts)
    scores = affinity(logits, config.score_function)
    topk_idx = select_experts(scores, config, bias)
    return GateOutput(topk_idx, weigh_experts(scores, topk_idx, config), scores)


def weigh_experts(scores: Tensor, topk_idx: Tensor, config: GateConfig) -> Tensor:
    """Weights of experts that have been chosen, as `gate` gives them.

    Args:
        scores: FP32 [T, E], affinities.
        topk_idx: int64 [T, K], in 0..E-1.
        config: the gate.

    Returns:
        FP32 [T, K], differentiable in `scores`.
    """
    weights = scores.gather(1, topk_idx)
    if config.normalize:
        total = weights.sum(dim=-1, keepdim=True)
        is_zero = total == 0
        # The inner where keeps 0/0 out of the branch that is not taken: its gradient would be NaN all the same.
        weights = torch.where(is_zero, 1.0 / topk_idx.shape[-1], weights / torch.where(is_zero, 1.0, total))
    return weights * config.route_scale


def dispatch_layout(topk_idx: Tensor, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where tokens go, without communication or waiting for the device.

    Args:
        topk_idx: int64 [num_tokens, num_topk], -1 = none, else below `num_experts`.
        num_experts: experts over all ranks.
        num_ranks: ranks of the group; divides `num_experts`.

    Returns:
        (int32 [num_ranks] tokens per rank, int32 [num_experts] tokens per expert, bool [num_tokens, num_ranks]).
    """
    if num_experts % num_ranks:
        raise ConfigError(f"num_experts={num_experts} is not divisible by num_ranks={num_ranks}")
    # -1 becomes num_experts, one place more than there are; it falls to a rank of its own.
    expert = topk_idx.remainder(num_experts + 1)
    rank = expert.div(num_experts // num_ranks, rounding_mode="floor")
    one = torch.ones(1, dtype=torch.int32, device=topk_idx.device)
    per_expert = one.new_zeros(num_experts + 1).scatter_add_(0, expert.flatten(), one.expand(expert.numel()))
    in_rank = one.new_zeros((topk_idx.shape[0], num_ranks + 1), dtype=torch.bool).scatter_(1, rank, True)
    in_rank = in_rank[:, :num_ranks].contiguous()
    return in_rank.sum(0, dtype=torch.int32), per_expert[:num_experts], in_rank


def expert_load(topk_idx: Tensor, num_experts: int) -> Tensor:
    """Tokens per expert, int64 [E]; -1 (masked) is not counted.

    Raises:
        ConfigError: an index is outside -1..num_experts-1.
    """
    flat = topk_idx.reshape(-1).long()
    if flat.numel():
        low, high = int(flat.min()), int(flat.max())
        if low < -1 or high >= num_experts:
            wrong = low if low < -1 else high
            raise ConfigError(f"topk_idx holds {wrong}, the rule: -1..num_experts-1={num_experts - 1}")
    return torch.bincount(flat[flat >= 0], minlength=num_experts)


def update_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """The bias of the next step: `- rate` for overloaded experts, `+ rate` for underloaded ones.

    Section 2.1.2, "auxiliary-loss-free load balancing" (rate 0.001 there); `load` covers the whole batch, so sum it
    over all ranks first.

    Args:
        bias: FP32 [E]; FP32 because BF16 would swallow steps of 0.001 next to a bias near 1.
        load: tokens per expert [E].
        rate: step size.

    Returns:
        A new FP32 tensor [E].
    """
    if bias.dtype != torch.float32 or bias.ndim != 1:
        raise ConfigError(f"bias is {bias.dtype} {list(bias.shape)}, the rule: float32 [num_experts]")
    if load.shape != bias.shape:
        raise ConfigError(f"load has shape {list(load.shape)}, bias {list(bias.shape)}; the rule: equal")
    # sign(mean - load) without dividing: exact for integer loads.
    return bias + rate * torch.sign(load.sum() - load * load.numel()).float()


def sequence_balance_loss(scores: Tensor, config: GateConfig, seq_len: int, alpha: float) -> Tensor:
    """Balance loss inside each sequence (equations 17 to 20), averaged over the sequences.

    `alpha * sum_i f_i P_i` with `f_i = E / (K T) * #{t: i in top-K of the unbiased scores of t}` (no group limit) and
    `P_i = 1/T sum_t s_it / sum_j s_jt`; T = `seq_len`. The gradient flows through `P` only: `f` counts.

    Args:
        scores: FP32 [num_sequences * seq_len, E], affinities.
        config: the gate (num_experts, num_topk).
        seq_len: tokens of one sequence.
        alpha: factor (0.0001 in DeepSeek-V3).

    Returns:
        FP32 scalar.
    """
    _check_experts("scores", scores, config.num_experts)
    num_tokens = scores.shape[0]
    if seq_len < 1 or num_tokens == 0 or num_tokens % seq_len:
        raise ConfigError(f"{num_tokens} tokens are not a whole number >= 1 of sequences of seq_len={seq_len}")
    chosen = topk(scores.detach(), config.num_topk)[1]
    counts = torch.zeros_like(scores, requires_grad=False).scatter_(1, chosen, 1.0)
    fraction = counts.view(-1, seq_len, config.num_experts).sum(dim=1)
    fraction = fraction * (config.num_experts / (config.num_topk * seq_len))
    total = scores.sum(dim=-1, keepdim=True)
    probability = scores / torch.where(total == 0, 1.0, total)
    mean_probability = probability.view(-1, seq_len, config.num_experts).mean(dim=1)
    return alpha * (fraction * mean_probability).sum(dim=-1).mean()
