"""Tokens and choices of a GPU benchmark, and what must come of them: every rank can make every rank's."""

from __future__ import annotations

from typing import Any

import torch

from commlib.bootstrap import Bootstrap
from commlib.config import RuntimeConfig
from commlib.quant import quantize_e4m3
from commlib.testing.workloads import make_workload
from commlib.topology import Topology

__all__ = ["RoutedRows"]

_WEIGHTS = (0.125, 0.25, 0.5)  # of slots, at random: products and their sums are exact


class RoutedRows:
    """Rows of all ranks and several routings.

    Args:
        boot: the ranks.
        device: of this rank.
        shape: num_tokens, hidden, num_topk, num_experts.
        workload: name of `commlib.testing.workloads`.
        num_routings: how many.
        seed: of the first of them.
    """

    def __init__(self, boot: Bootstrap, device: Any, shape: Any, workload: str, num_routings: int, seed: int) -> None:
        self.rank, self.num_ranks, self.num_routings = boot.rank, boot.size, num_routings
        self._per_rank = shape.num_experts // boot.size
        works = [
            make_workload(
                workload,
                num_ranks=boot.size,
                num_experts=shape.num_experts,
                num_topk=shape.num_topk,
                num_tokens=shape.num_tokens,
                seed=seed + i,
            )
            for i in range(num_routings)
        ]
        self._idx = [[idx.to(device) for idx in work.topk_idx] for work in works]
        self._x = [self._make_rows(rank, works[0].num_tokens[rank], shape.hidden, device) for rank in range(boot.size)]
        self._weights = [self._make_weights(rank, len(x), shape.num_topk, device) for rank, x in enumerate(self._x)]
        self.weights = self._weights[boot.rank]
        # Of the rank that sends most.
        self.num_remote_rows = [
            max(self._count_remote(which, source) for source in range(boot.size)) for which in range(num_routings)
        ]

    @staticmethod
    def _make_rows(rank: int, num_tokens: int, hidden: int, device: Any) -> Any:
        generator = torch.Generator(device=device).manual_seed(rank)
        return torch.randn((num_tokens, hidden), generator=generator, device=device).to(torch.bfloat16)

    @staticmethod
    def _make_weights(rank: int, num_tokens: int, num_topk: int, device: Any) -> Any:
        generator = torch.Generator(device=device).manual_seed(1000 + rank)
        which = torch.randint(len(_WEIGHTS), (num_tokens, num_topk), generator=generator, device=device)
        return torch.tensor(_WEIGHTS, device=device)[which]

    def own(self) -> Any:
        return self._x[self.rank]

    def choices(self, which: int) -> Any:
        return self._idx[which][self.rank]

    def _owners(self, which: int, source: int) -> Any:
        """[token, slot] rank of the expert, -1 for masked slots."""
        idx = self._idx[which][source]
        return torch.where(idx >= 0, idx // self._per_rank, -1)

    def _count_remote(self, which: int, source: int) -> int:
        owners = self._owners(which, source)
        return sum(int((owners == peer).any(dim=1).sum()) for peer in range(self.num_ranks) if peer != source)

    def rows_per_node(self, topology: Topology) -> list[int]:
        """[node] own tokens with an expert there, mean over routings; 0 for the own node."""
        mean = []
        for node in range(topology.num_nodes):
            ranks = torch.tensor(topology.ranks_of_node(node), device=self.own().device)
            counts = [
                int(torch.isin(self._owners(which, self.rank), ranks).any(dim=1).sum())
                for which in range(self.num_routings)
            ]
            mean.append(0 if node == topology.node(self.rank) else round(sum(counts) / len(counts)))
        return mean

    def most_rows(self, alignment: int) -> int:
        """Rows of the largest output in layout "grouped" of any routing on any rank."""
        most = 0
        for each in self._idx:
            chosen = torch.cat([idx[idx >= 0] for idx in each])
            load = torch.bincount(chosen, minlength=self._per_rank * self.num_ranks)
            padded = (load + alignment - 1) // alignment * alignment
            most = max(most, int(padded.view(self.num_ranks, -1).sum(dim=1).max()))
        return most

    def check_dispatched(self, which: int, got: Any, layout: str, fp8: str | None, config: RuntimeConfig) -> None:
        """Raises AssertionError unless every row is there, bit by bit, and padding is zero."""
        given = [(x, None) if fp8 is None else quantize_e4m3(x, pow2=fp8 == "pow2") for x in self._x]
        if layout == "rows":
            self._check_rows_layout(which, got, given)
            return
        row = 0
        for expert in range(self.rank * self._per_rank, (self.rank + 1) * self._per_rank):
            begin = row
            row = self._check_expert(which, got, given, expert, row)
            end = begin + -(-(row - begin) // config.expert_alignment) * config.expert_alignment
            assert not bool(got.x[row:end].view(torch.uint8).any()), f"padding of expert {expert}"
            assert not bool(got.row_weights[row:end].any()), f"weights in the padding of expert {expert}"
            row = end
        assert row == got.x.shape[0], f"{got.x.shape[0]} rows, expected {row}"

    def check_counted(self, which: int, got: Any, fp8: str) -> None:
        """Like `check_dispatched` for a grouped result of alignment 1 whose counts are on the device."""
        count = int(got.num_tokens_per_expert.sum())
        given = [quantize_e4m3(x, pow2=fp8 == "pow2") for x in self._x]
        row = 0
        for expert in range(self.rank * self._per_rank, (self.rank + 1) * self._per_rank):
            row = self._check_expert(which, got, given, expert, row)
        assert row == count, f"{count} rows, expected {row}"
        assert not bool(got.row_weights[row:].any()), "weights behind the rows"

    def _check_expert(self, which: int, got: Any, given: list[Any], expert: int, row: int) -> int:
        """The rows of an expert begin at `row`; returns where they end."""
        for source, (x, scales) in enumerate(given):
            token, slot = (self._idx[which][source] == expert).nonzero(as_tuple=True)
            rows = slice(row, row + len(token))
            _require_rows(got, rows, x[token], None if scales is None else scales[token])
            weights = self._weights[source][token, slot]
            assert torch.equal(got.row_weights[rows], weights), f"weights of expert {expert}, rank {source}"
            row += len(token)
        return row

    def _check_rows_layout(self, which: int, got: Any, given: list[Any]) -> None:
        row = 0
        for source, (x, scales) in enumerate(given):
            is_here = self._owners(which, source) == self.rank
            tokens = is_here.any(dim=1).nonzero()[:, 0]
            rows = slice(row, row + len(tokens))
            _require_rows(got, rows, x[tokens], None if scales is None else scales[tokens])
            local = torch.where(is_here, self._idx[which][source] - self.rank * self._per_rank, -1)[tokens]
            assert torch.equal(got.topk_idx[rows], local), f"expert ids of rank {source}'s tokens"
            weights = torch.where(is_here, self._weights[source], 0.0)[tokens]
            assert torch.equal(got.topk_weights[rows], weights), f"weights of rank {source}'s tokens"
            row += len(tokens)
        assert row == got.x.shape[0], f"{got.x.shape[0]} rows, expected {row}"

    def check_combined(self, which: int, out: Any, layout: str, topology: Topology, *, is_weighted: bool) -> None:
        """Raises AssertionError unless `out` is the sum of copies of the own rows, rounded once per rank, once more
        per other node, and at the end.

        Copies of one row times these weights add up exactly in FP32, so plain sums say what every rounding must give.
        """
        owners, x = self._owners(which, self.rank), self._x[self.rank].float()
        of_slot = self.weights if is_weighted else torch.ones_like(self.weights)
        total = torch.zeros_like(x)
        for node in range(topology.num_nodes):
            of_node = torch.zeros_like(x)
            for peer in topology.ranks_of_node(node):
                is_there = owners == peer
                factor = torch.where(is_there, of_slot, 0.0).sum(dim=1)[:, None]
                if layout == "rows":
                    factor = is_there.any(dim=1)[:, None].float()
                of_node += (factor * x).to(torch.bfloat16).float()
            total += of_node if node == topology.node(self.rank) else of_node.to(torch.bfloat16).float()
        assert torch.equal(out, total.to(torch.bfloat16)), "combined rows"

    def check_summed(self, which: int, out: Any) -> None:
        """Raises AssertionError unless `out` is the weighted sum of copies of the own rows, rounded once."""
        chosen = torch.where(self.choices(which) >= 0, self.weights, 0.0).sum(dim=1)[:, None]
        assert torch.equal(out, (chosen * self.own().float()).to(torch.bfloat16)), "summed rows"


def _require_rows(got: Any, rows: slice, x: Any, scales: Any) -> None:
    assert torch.equal(got.x[rows].view(torch.uint8), x.view(torch.uint8)), f"rows {rows}"
    if scales is not None:
        assert torch.equal(got.scales[rows], scales), f"scales of rows {rows}"
