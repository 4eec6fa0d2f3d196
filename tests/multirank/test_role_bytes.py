"""Every role touches as many bytes as protocol steps P2 to P4 name, and not one more (docs/design.md section 3).

`push` reads a row once; a further copy, a staging buffer or a second read would show as another number here.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

import commlib
from commlib.testing.spawn import check_ranks

pytestmark = pytest.mark.multirank

HIDDEN, NUM_EXPERTS, NUM_TOPK, NUM_TOKENS = 64, 8, 4, 50
ROW = 4 * HIDDEN


def choices(rank: int) -> npt.NDArray[np.int64]:
    """topk_idx of a rank's tokens, computable on every rank."""
    scores = np.random.default_rng(rank).random((NUM_TOKENS, NUM_EXPERTS))
    return np.argsort(scores, axis=1)[:, :NUM_TOPK]


def expected_rows(topology: commlib.Topology, me: int) -> dict[str, tuple[int, int]]:
    """Role -> (rows read, rows written) of one dispatch and one combine on rank `me`, by counting tokens one by one."""
    experts_per_rank = NUM_EXPERTS // topology.num_ranks
    names = ("push", "scale_out_send", "forward", "expand", "reduce", "forward_reduce", "final_reduce")
    count = {name: [0, 0] for name in names}

    def add(name: str, read: int, written: int) -> None:
        count[name][0] += read
        count[name][1] += written

    def writes(counts: dict[int, int]) -> int:  # one to each rank of the node, all slots of the own one
        return sum(slots if rank == me else 1 for rank, slots in counts.items())

    here = topology.node(me)
    for source in range(topology.num_ranks):
        for token in choices(source):
            ranks, slots = np.unique(token // experts_per_rank, return_counts=True)
            on_node: dict[int, dict[int, int]] = {}
            for rank, num_slots in zip(ranks.tolist(), slots.tolist(), strict=True):
                on_node.setdefault(topology.node(rank), {})[rank] = num_slots
            home = topology.node(source)
            if source == me:
                if home in on_node:
                    add("push", 1, writes(on_node[home]))
                for _ in set(on_node) - {home}:
                    add("scale_out_send", 1, 1)
                # Partial rows of the own node's ranks, and one row of every other node.
                add("final_reduce", len(on_node.get(home, {})) + len(set(on_node) - {home}), 1)
            if home != here and here in on_node and topology.rail(source, here) == me:
                add("forward", 1, writes(on_node[here]))
                add("forward_reduce", len(on_node[here]), 1)
            if me in on_node.get(here, {}):
                mine = on_node[here][me]
                writer = source if home == here else topology.rail(source, here)
                if writer != me:
                    add("expand", mine - 1, mine - 1)
                add("reduce", mine, 1)
    return {name: (read, written) for name, (read, written) in count.items()}


def count_rank() -> None:
    config = commlib.RuntimeConfig(
        hidden=HIDDEN,
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        max_tokens=NUM_TOKENS,
        expert_alignment=1,
        timeout_s=30,
    )
    with commlib.Runtime(None, config) as rt:
        x = np.ones((NUM_TOKENS, HIDDEN), dtype=np.float32)
        d = rt.dispatch(x, choices(rt.rank))
        rt.combine(d.x, d.handle)
        counted = rt.counters()["roles"]
        for name, (read, written) in expected_rows(rt.topology, rt.rank).items():
            have = counted.get(name, {"bytes_read": 0, "bytes_written": 0})
            want = (read * ROW, written * ROW)
            assert (have["bytes_read"], have["bytes_written"]) == want, (name, have, want)


@pytest.mark.parametrize("ranks_per_node", [4, 2])
def test_roles_touch_no_byte_beyond_the_protocol(ranks_per_node: int) -> None:
    check_ranks("test_role_bytes:count_rank", 4, ranks_per_node=ranks_per_node, env={"UCX_TLS": "tcp,self"})
