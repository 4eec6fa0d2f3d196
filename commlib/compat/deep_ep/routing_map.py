"""Routing as a dense map [tokens, experts] and as a Runtime wants it: a fixed number of slots per token.

A token with more experts than slots becomes several rows of slots ("lines"): the Runtime sees each as a token of its
own, and their sums are added up at the end. That is how one Runtime serves maps that capacity limits or padding have
made uneven, without the ranks having to agree on anything per call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Lines", "indices_to_map", "most_experts", "to_lines"]


class Lines(NamedTuple):
    """Routing in lines.

    Attributes:
        topk_idx: int64 [num_lines, num_topk], -1 = none.
        topk_weights: FP32 [num_lines, num_topk], 0 where there is none; or None.
        token: int64 [num_lines], the token of each line, ascending; None: line i is token i.
        num_tokens, num_experts: shape of the map.
    """

    topk_idx: Tensor
    topk_weights: Tensor | None
    token: Tensor | None
    num_tokens: int
    num_experts: int

    def spread(self, rows: Tensor) -> Tensor:
        """[num_tokens, ...] -> [num_lines, ...]."""
        return rows if self.token is None else rows[self.token]

    def gather(self, rows: Tensor) -> Tensor:
        """[num_lines, hidden] -> [num_tokens, hidden]: the sum of each token's lines, in FP32, rounded once."""
        if self.token is None:
            return rows
        total = torch.zeros((self.num_tokens, rows.shape[1]), dtype=torch.float32, device=rows.device)
        return total.index_add_(0, self.token, rows.float()).to(rows.dtype)

    def to_dense(self, values: Tensor) -> Tensor:
        """FP32 [num_lines, num_topk] per slot -> FP32 [num_tokens, num_experts], 0 where there is no expert."""
        # One column more, for slots without an expert.
        column = torch.where(self.topk_idx < 0, self.num_experts, self.topk_idx)
        dense = values.new_zeros((len(values), self.num_experts + 1)).scatter_(1, column, values)[:, : self.num_experts]
        if self.token is None:
            return dense.contiguous()
        return values.new_zeros((self.num_tokens, self.num_experts)).index_add_(0, self.token, dense)


def most_experts(routing_map: Tensor) -> int:
    """The most experts that a token of bool [num_tokens, num_experts] has."""
    return int(routing_map.sum(dim=1).max()) if routing_map.numel() else 0


def to_lines(routing_map: Tensor, probs: Tensor | None, num_topk: int) -> Lines:
    """Turns a map into lines of `num_topk` slots; a token's experts ascending.

    Args:
        routing_map: bool [num_tokens, num_experts].
        probs: FP32 [num_tokens, num_experts] or None.
        num_topk: slots of a line.
    """
    num_tokens, num_experts = routing_map.shape
    per_token = routing_map.sum(dim=1)
    token, expert = routing_map.nonzero(as_tuple=True)
    place = torch.arange(len(token), device=token.device) - (per_token.cumsum(0) - per_token)[token]
    lines_per_token = per_token.add(num_topk - 1).div(num_topk, rounding_mode="floor").clamp_min(1)
    first_line = lines_per_token.cumsum(0) - lines_per_token
    num_lines = int(lines_per_token.sum())
    line, slot = first_line[token] + place.div(num_topk, rounding_mode="floor"), place % num_topk
    topk_idx = torch.full((num_lines, num_topk), -1, dtype=torch.int64, device=token.device)
    topk_idx[line, slot] = expert
    topk_weights = None
    if probs is not None:
        topk_weights = torch.zeros((num_lines, num_topk), dtype=torch.float32, device=token.device)
        topk_weights[line, slot] = probs[token, expert].float()
    token_of_line = None if num_lines == num_tokens else torch.repeat_interleave(lines_per_token)
    return Lines(topk_idx, topk_weights, token_of_line, num_tokens, num_experts)


def indices_to_map(
    topk_idx: Tensor, topk_weights: Tensor | None, num_of_tokens: int, num_of_experts: int
) -> tuple[Tensor, Tensor | None]:
    """The dense form of indices.

    Args:
        topk_idx: [num_of_tokens, num_topk], -1 = none.
        topk_weights: FP32 [num_of_tokens, num_topk] or None.

    Returns:
        (bool [num_of_tokens, num_of_experts], FP32 of the same shape or None).
    """
    lines = Lines(topk_idx.to(torch.int64), None, None, num_of_tokens, num_of_experts)
    ones = torch.ones(topk_idx.shape, dtype=torch.float32, device=topk_idx.device)
    probs = None if topk_weights is None else lines.to_dense(topk_weights.float())
    return lines.to_dense(ones).bool(), probs
