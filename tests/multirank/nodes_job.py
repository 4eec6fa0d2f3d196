"""One rank of test_nodes: dispatch and combine over a real network interface, everything checked on the spot.

Every rank makes the inputs of all ranks from the seed, so that each can hold its own result against the oracle.
Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

import commlib
from commlib import reference, routing
from commlib.testing.payloads import assert_identity, identity_payload

NUM_EXPERTS = 16
NUM_TOPK = 4
HIDDEN = 2048  # FP32: rows of 8 KiB


def interface_bytes() -> dict[str, int]:
    """rx and tx bytes of eth0 in this process's network namespace."""
    with open("/proc/self/net/dev", encoding="ascii") as file:
        for line in file:
            name, _, numbers = line.partition(":")
            if name.strip() == "eth0":
                fields = numbers.split()
                return {"rx": int(fields[0]), "tx": int(fields[8])}
    raise AssertionError("this host has no eth0")


def make_routing(topology: commlib.Topology, num_tokens: int, max_nodes: int | None) -> list[Any]:
    """[rank] gate output for that rank's tokens, node-limited if asked."""
    config = routing.GateConfig(
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        group_of_expert=topology.node_of_expert(NUM_EXPERTS),
        max_groups=max_nodes,
    )
    outputs = []
    for rank in range(topology.num_ranks):
        generator = torch.Generator().manual_seed(rank)
        outputs.append(routing.gate(torch.randn(num_tokens, NUM_EXPERTS, generator=generator), config))
    return outputs


def lower_bound_rows(topology: commlib.Topology, topk_idx: torch.Tensor, source: int) -> int:
    """Copies that tokens of `source` need over the network: one per token and remote node."""
    nodes = torch.tensor(topology.node_of_expert(NUM_EXPERTS))[topk_idx]
    return sum(
        int((nodes == node).any(dim=1).sum()) for node in range(topology.num_nodes) if node != topology.node(source)
    )


def main(num_tokens: int, max_nodes: int | None) -> None:
    config = commlib.RuntimeConfig(
        hidden=HIDDEN,
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        max_tokens=num_tokens,
        expert_alignment=1,
        timeout_s=60,
    )
    with commlib.Runtime(None, config) as rt:
        topology, rank = rt.topology, rt.rank
        gates = make_routing(topology, num_tokens, max_nodes)
        xs = [identity_payload(r, num_tokens, HIDDEN, torch.float32) for r in range(rt.num_ranks)]
        idxs = [g.topk_idx for g in gates]
        weights = [g.topk_weights for g in gates]
        expected = reference.dispatch(xs, idxs, weights, NUM_EXPERTS, layout="grouped")

        rt.barrier()
        start = interface_bytes()
        d = rt.dispatch(xs[rank], idxs[rank], weights[rank])
        rt.barrier()
        middle, dispatched = interface_bytes(), rt.counters()["payload_bytes"]
        out = rt.combine(d.x, d.handle, weights=d.row_weights)
        rt.barrier()
        end, moved = interface_bytes(), rt.counters()["payload_bytes"]

        assert torch.equal(d.x, expected[rank].x)
        assert_identity(d.x, expected[rank].source)
        home = reference.combine(
            [e.x for e in expected],
            expected,
            idxs,
            NUM_EXPERTS,
            list(topology.node_of_rank),
            weights=[e.row_weights for e in expected],
        )
        assert torch.equal(out.x, home[rank][0])
        bounds = [lower_bound_rows(topology, idxs[s], s) * HIDDEN * 4 for s in range(rt.num_ranks)]
        node = topology.node(rank)
        report = {
            "rank": rank,
            "node": node,
            "description": rt.describe(),
            "dispatch_payload": dispatched,
            "combine_payload": moved - dispatched,
            "dispatch_bound": bounds[rank],
            # Combine: this rank sends home what its in_sources sent here.
            "combine_bound": sum(
                int((torch.tensor(topology.node_of_expert(NUM_EXPERTS))[idxs[s]] == node).any(dim=1).sum()) * HIDDEN * 4
                for s in topology.in_sources(rank)
            ),
            "dispatch_tx": middle["tx"] - start["tx"],
            "combine_tx": end["tx"] - middle["tx"],
            "most_nodes": max(len(set(row.tolist())) for row in nodes_of(topology, idxs[rank])),
        }
    print(json.dumps(report) + "\n", end="", flush=True)


def nodes_of(topology: commlib.Topology, topk_idx: torch.Tensor) -> torch.Tensor:
    return torch.tensor(topology.node_of_expert(NUM_EXPERTS))[topk_idx]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) or None)
