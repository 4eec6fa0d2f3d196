"""Rows that a dispatch and its combine put on each tier: counted for a given routing, or expected for a balanced one.

Both are lower bounds: one copy of a token per remote node (scale-out), one per further rank of a node (scale-up).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import numpy.typing as npt

from commlib.errors import ConfigError
from commlib.topology import Topology

__all__ = ["Traffic", "count_traffic", "expected_traffic"]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Rows of one rank in one dispatch; combine is the mirror image, so it moves as many the other way.

    Attributes:
        sent_out: rows to other nodes, one per token and node.
        received_out: rows from other nodes, for which the rank is the rail.
        stored_up: rows that the rank stores at other ranks of its node, its own tokens' and those it forwards.
        stored_here: rows of both kinds that stay on the rank.
    """

    sent_out: float
    received_out: float
    stored_up: float
    stored_here: float


def count_traffic(
    topology: Topology, topk_idx: Sequence[npt.NDArray[np.int64]], num_experts: int
) -> tuple[Traffic, ...]:
    """Per rank, for given choices.

    Args:
        topology: the ranks.
        topk_idx: per rank int64 [num_tokens, num_topk], -1 = masked.
        num_experts: over all ranks.
    """
    num_ranks = topology.num_ranks
    if num_experts % num_ranks or len(topk_idx) != num_ranks:
        raise ConfigError(f"num_experts={num_experts} and {len(topk_idx)} routings do not fit num_ranks={num_ranks}")
    counts = np.zeros((num_ranks, 4), dtype=np.int64)
    node_of_rank = np.array(topology.node_of_rank)
    for source, choices in enumerate(topk_idx):
        wanted = np.zeros((len(choices), num_ranks + 1), dtype=bool)  # the last column takes what is masked
        rank_of_slot = np.where(choices < 0, num_ranks, choices // (num_experts // num_ranks))
        np.put_along_axis(wanted, rank_of_slot, True, axis=1)
        wanted = wanted[:, :num_ranks]
        for node in range(topology.num_nodes):
            on_node = wanted[:, node_of_rank == node]
            carrier = topology.rail(source, node)  # the source itself on its own node
            if carrier != source:
                rows = int(on_node.any(axis=1).sum())
                counts[source, 0] += rows
                counts[carrier, 1] += rows
            stays = int(wanted[:, carrier].sum())
            counts[carrier, 2] += int(on_node.sum()) - stays
            counts[carrier, 3] += stays
    return tuple(
        Traffic(sent_out=out, received_out=into, stored_up=up, stored_here=here) for out, into, up, here in counts
    )


def _expected_hits(num_groups: int, group_size: int, num_picks: int) -> float:
    """Groups of equal size that `num_picks` different members, all equally likely, fall on."""
    total = num_groups * group_size
    return num_groups * (1.0 - comb(total - group_size, num_picks) / comb(total, num_picks))


def expected_traffic(
    topology: Topology, *, num_tokens: int, num_topk: int, num_experts: int, max_nodes: int | None = None
) -> Traffic:
    """Of every rank, on average, if all experts are equally likely.

    Args:
        topology: nodes of equally many ranks.
        num_tokens, num_topk, num_experts: of every rank.
        max_nodes: a token picks so many nodes first, its experts from these; None = any.

    Raises:
        ConfigError: nodes differ, experts do not spread evenly, or `max_nodes` nodes hold fewer than `num_topk`.
    """
    num_nodes, num_ranks = topology.num_nodes, topology.num_ranks
    ranks_per_node = num_ranks // num_nodes
    if any(len(topology.ranks_of_node(node)) != ranks_per_node for node in range(num_nodes)):
        raise ConfigError("nodes of different sizes have no traffic that every rank expects")
    if num_experts % num_ranks:
        raise ConfigError(f"num_experts={num_experts} is not divisible by num_ranks={num_ranks}")
    reach = min(max_nodes or num_nodes, num_nodes)
    per_rank = num_experts // num_ranks
    if num_topk > reach * ranks_per_node * per_rank:
        raise ConfigError(f"num_topk={num_topk} is above the experts of max_nodes={reach} nodes")
    nodes = num_tokens * _expected_hits(reach, ranks_per_node * per_rank, num_topk)
    ranks = num_tokens * _expected_hits(reach * ranks_per_node, per_rank, num_topk)
    out = nodes * (num_nodes - 1) / num_nodes
    here = ranks / ranks_per_node
    return Traffic(sent_out=out, received_out=out, stored_up=ranks - here, stored_here=here)
