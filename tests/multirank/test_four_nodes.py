"""Eight ranks as four nodes of two: rails that forward for three sources, tokens that go to up to three other nodes."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from moe_job import HIDDEN, free_ports, open_runtime, part_of_job
from test_dispatch_combine import check_cases, check_fp8, open_for, random_case, workload_of

from commlib.errors import PeerLostError
from commlib.testing.spawn import check_ranks, run_ranks
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


@pytest.mark.parametrize("num_proxy_threads", [1, 2])
def test_four_nodes_of_two(num_proxy_threads: int) -> None:
    check_ranks(
        "test_four_nodes:oracle_rank",
        len(NODES),
        args=[free_ports(1)[0]],
        env={"UCX_TLS": "tcp,self", "COMMLIB_NUM_PROXY_THREADS": str(num_proxy_threads)},
        timeout_s=200,
    )


def lost_rank(port: int) -> None:
    """Rank 2 of three nodes kills itself; each of the others has a proxy thread for either other node."""
    rank = int(os.environ["COMMLIB_RANK"])
    group = part_of_job(port, rank, 3)
    with open_runtime(group, (0, 1, 2), num_proxy_threads=2, heartbeat_timeout_s=4.0) as runtime:
        assert "2 threads" in runtime.describe()
        x, idx = torch.ones(8, HIDDEN), torch.arange(3).repeat(8, 1) * 4
        d = runtime.dispatch(x, idx)
        runtime.combine(d.x, d.handle)
        with pytest.raises(PeerLostError) as caught:
            runtime.barrier()
            if rank == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            while True:
                runtime.combine(d.x, d.handle)
        assert caught.value.peer == 2
        begin = time.monotonic()
    assert time.monotonic() - begin < 10
    group.close()


def test_a_lost_rank_with_several_proxy_threads() -> None:
    results = run_ranks(
        "test_four_nodes:lost_rank", 3, args=[free_ports(1)[0]], env={"UCX_TLS": "tcp,self"}, timeout_s=60
    )
    assert [result.returncode for result in results] == [0, 0, -signal.SIGKILL], results
