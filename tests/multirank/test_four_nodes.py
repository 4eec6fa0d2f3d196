"""Eight ranks as four nodes of two: rails that forward for three sources, tokens that go to up to three other nodes."""

from __future__ import annotations

import os

import pytest
import torch
from moe_job import HIDDEN, free_ports, part_of_job
from test_dispatch_combine import check_cases, check_fp8, open_for, random_case, workload_of

from commlib.testing.spawn import check_ranks
from commlib.traffic import count_traffic

pytestmark = pytest.mark.multirank

NODES = (0, 0, 1, 1, 2, 2, 3, 3)


def oracle_rank(port: int) -> None:
    rank = int(os.environ["COMMLIB_RANK"])
    group = part_of_job(port, rank, len(NODES))
    with open_for(group, "uniform", NODES) as runtime:
        check_cases(runtime, ("uniform", "uneven", "node_limited"), NODES)
        check_fp8(runtime, ("masked",), NODES, ("grouped",))
    # Payload bytes: one row per token and remote node, there and back, and not one more.
    with open_for(group, "uniform", NODES) as runtime:
        work = workload_of("uniform", NODES)
        case = random_case(work, NODES, "grouped", torch.float32, 8)
        traffic = count_traffic(runtime.topology, [idx.numpy() for idx in work.topk_idx], work.num_experts)[rank]
        got = case.dispatch(runtime)
        assert traffic.sent_out > 0 and runtime.counters()["payload_bytes"] == traffic.sent_out * HIDDEN * 4
        runtime.combine(got.x, got.handle)
        assert runtime.counters()["payload_bytes"] == (traffic.sent_out + traffic.received_out) * HIDDEN * 4
    group.close()


def test_four_nodes_of_two() -> None:
    check_ranks(
        "test_four_nodes:oracle_rank", len(NODES), args=[free_ports(1)[0]], env={"UCX_TLS": "tcp,self"}, timeout_s=200
    )
