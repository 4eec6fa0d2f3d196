"""Dispatch and combine in numpy only, held against sums written down here, for machines without torch.

Every rank makes the inputs of all ranks from their numbers, so that each can check its own result.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import numpy.typing as npt

import commlib
from commlib.errors import CommError
from commlib.runtime import Runtime

NUM_EXPERTS, NUM_TOPK, HIDDEN, NUM_TOKENS = 8, 4, 256, 48
LOST = 3  # the rank that dies in `lose_rank`

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def routing(rank: int, round_: int) -> Ints:
    """topk_idx [num_tokens, num_topk] of a rank; some slots masked, numbers of tokens differ between ranks."""
    random = np.random.default_rng([rank, round_])
    idx = np.argsort(random.random((NUM_TOKENS - 5 * rank, NUM_EXPERTS)), axis=1)[:, :NUM_TOPK]
    idx[random.random(idx.shape) < 0.1] = -1
    return idx.astype(np.int64)


def rows(rank: int, round_: int) -> Floats:
    """x [num_tokens, hidden] of a rank: full mantissas, so that every order of summation gives other bits."""
    random = np.random.default_rng([rank, round_, 1])
    return random.standard_normal((NUM_TOKENS - 5 * rank, HIDDEN), dtype=np.float32)


def expert(x: Floats, number: int) -> Floats:
    """What an expert makes of rows."""
    return x * np.float32(1 + number / 7)


def expected_rows(rank: int, num_ranks: int, round_: int) -> tuple[Floats, Ints]:
    """Rows of `rank` after dispatch: expert ascending, then source rank, then token; and each row's expert."""
    found, experts = [], []
    for number in range(rank * NUM_EXPERTS // num_ranks, (rank + 1) * NUM_EXPERTS // num_ranks):
        for source in range(num_ranks):
            chosen = (routing(source, round_) == number).any(axis=1)
            found.append(rows(source, round_)[chosen])
            experts.append(np.full(int(chosen.sum()), number, dtype=np.int64))
    return np.concatenate(found), np.concatenate(experts)


def expected_sum(topology: commlib.Topology, rank: int, round_: int) -> Floats:
    """Combine without weights, in the order of docs/design.md: experts of a rank, ranks of a node, nodes; ascending."""
    x, idx = rows(rank, round_), routing(rank, round_)
    per_rank = NUM_EXPERTS // topology.num_ranks
    out = np.zeros_like(x)
    for token in range(len(x)):
        total: Floats | None = None
        for node in range(topology.num_nodes):
            on_node: Floats | None = None
            for other in topology.ranks_of_node(node):
                partial: Floats | None = None
                for number in sorted(e for e in idx[token].tolist() if e // per_rank == other and e >= 0):
                    y = expert(x[token], number)
                    partial = y if partial is None else partial + y
                if partial is not None:
                    on_node = partial if on_node is None else on_node + partial
            if on_node is not None:
                total = on_node if total is None else total + on_node
        if total is not None:
            out[token] = total
    return out


def bytes_to_other_nodes(topology: commlib.Topology, rank: int, round_: int) -> int:
    """The lower bound of dispatch: one row per token and remote node."""
    node_of_expert = np.array([topology.node(e * topology.num_ranks // NUM_EXPERTS) for e in range(NUM_EXPERTS)])
    copies = 0
    for token in routing(rank, round_):
        nodes = set(node_of_expert[token[token >= 0]].tolist()) - {topology.node(rank)}
        copies += len(nodes)
    return copies * HIDDEN * 4


def open_runtime(**changes: Any) -> Runtime:
    """Rings of a few rows, so that they go round many times."""
    config: dict[str, Any] = {
        "hidden": HIDDEN,
        "num_experts": NUM_EXPERTS,
        "num_topk": NUM_TOPK,
        "max_tokens": NUM_TOKENS,
        "expert_alignment": 1,
        "chunk_bytes": 8192,
        "ring_bytes": 32768,
        "timeout_s": 60.0,
        "heartbeat_timeout_s": 30.0,
        **changes,
    }
    return Runtime(None, commlib.RuntimeConfig(**config), connect_timeout_s=60)


def check_rank(rank: int, num_rounds: int = 2) -> dict[str, Any]:
    """Dispatches and combines, every value checked; tells what carried the bytes and how many there were."""
    with open_runtime() as rt:
        bound = 0
        before = rt.counters()["payload_bytes"]
        dispatched = 0
        for round_ in range(num_rounds):
            idx = routing(rank, round_)
            d = rt.dispatch(rows(rank, round_), idx)
            want, experts = expected_rows(rank, rt.num_ranks, round_)
            np.testing.assert_array_equal(d.x, want)
            dispatched += rt.counters()["payload_bytes"] - before
            bound += bytes_to_other_nodes(rt.topology, rank, round_)
            y = np.concatenate([expert(d.x[experts == e], e) for e in np.unique(experts)]) if len(experts) else d.x
            out = rt.combine(y, d.handle)
            np.testing.assert_array_equal(out.x, expected_sum(rt.topology, rank, round_))
            before = rt.counters()["payload_bytes"]
        return {"describe": rt.describe(), "payload": dispatched, "bound": bound}


def lose_rank(rank: int) -> dict[str, Any]:
    """Rank LOST kills itself after a round; what the others are told, and how soon."""
    rt = open_runtime(heartbeat_timeout_s=8.0)
    d = rt.dispatch(rows(rank, 0), routing(rank, 0))
    rt.combine(d.x, d.handle)
    started = time.monotonic()
    try:
        rt.barrier()  # nobody waits for rows of the lost rank; its last word in this barrier may die with it
        if rank == LOST:
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            d = rt.dispatch(rows(rank, 0), routing(rank, 0))
            rt.combine(d.x, d.handle)
    except CommError as error:
        seconds = time.monotonic() - started
        told = {"type": type(error).__name__, "peer": getattr(error, "peer", None), "message": str(error)}
    closing = time.monotonic()
    rt.close()
    return {**told, "seconds": seconds, "close_seconds": time.monotonic() - closing}
