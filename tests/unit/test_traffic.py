"""Forecasts: rows against counting tokens one by one, bytes against the lower bounds, rings against what C++ makes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from commlib import _native
from commlib.cli import main
from commlib.cli.plan import forecast
from commlib.config import RuntimeConfig
from commlib.errors import ConfigError
from commlib.launch_plan import LinkRates, plan_launch, plan_ring
from commlib.testing.workloads import make_workload
from commlib.topology import Topology
from commlib.traffic import count_traffic, expected_traffic


def test_counted_rows_of_one_token() -> None:
    """Rank 1 of nodes (0 1) (2 3) with a token for ranks 0, 1 and 3: rank 3 is its rail and keeps it."""
    topology = Topology((0, 0, 1, 1))
    none = np.empty((0, 4), dtype=np.int64)
    choices = [none, np.array([[0, 2, 7, -1]]), none, none]
    counted = [(t.sent_out, t.received_out, t.stored_up, t.stored_here) for t in count_traffic(topology, choices, 8)]
    assert counted == [(0, 0, 0, 0), (1, 0, 1, 1), (0, 0, 0, 0), (0, 1, 0, 1)]


@pytest.mark.parametrize("max_nodes", [None, 2])
def test_expected_rows_are_the_mean_of_counted_ones(max_nodes: int | None) -> None:
    topology = Topology.uniform(16, 4)
    tokens, topk, experts = 2000, 6, 64
    name = "uniform" if max_nodes is None else "node_limited"
    work = make_workload(
        name, num_ranks=16, num_experts=experts, num_topk=topk, num_tokens=tokens, seed=3,
        node_of_rank=topology.node_of_rank, **({} if max_nodes is None else {"max_nodes": max_nodes}),
    )  # fmt: skip
    counted = count_traffic(topology, [idx.numpy() for idx in work.topk_idx], experts)
    expected = expected_traffic(topology, num_tokens=tokens, num_topk=topk, num_experts=experts, max_nodes=max_nodes)
    for field in ("sent_out", "received_out", "stored_up", "stored_here"):
        mean = float(np.mean([getattr(each, field) for each in counted]))
        # 32000 tokens; a token's rows have a standard deviation below 1.5.
        assert abs(mean - getattr(expected, field)) < 6 * 1.5 / 32000**0.5 * tokens, (field, mean, expected)


@pytest.mark.parametrize("num_nodes", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("rates", [LinkRates(), LinkRates(scale_out=25e9, scale_up=150e9)])
def test_forecasts_keep_to_the_lower_bounds(num_nodes: int, rates: LinkRates) -> None:
    config = RuntimeConfig(hidden=7168, num_experts=max(256, 8 * num_nodes), num_topk=8, num_sms=20)
    plan = forecast(config, Topology.uniform(8 * num_nodes, 8), rates, max_nodes=4)
    # Exactly max_nodes nodes hold the experts of a token at most, its own may be one; at least one rank a node.
    rows = plan.traffic.sent_out
    assert 0 < rows <= config.max_tokens * 4
    assert plan.traffic.stored_up + plan.traffic.stored_here >= rows
    for step, row_bytes in ((plan.dispatch, 7168 + 4 * 56), (plan.combine, 2 * 7168)):
        assert step.out_row_bytes == rows * row_bytes
        assert step.out_row_bytes <= step.out_bytes < 1.03 * step.out_row_bytes  # records: 16 + 16 * 8 bytes
        assert step.seconds > max(step.out_bytes / rates.scale_out, step.up_bytes / rates.scale_up)
        assert step.ring.num_chunks >= 2
    assert plan.launch.num_blocks == 20
    # Four rings per other node and two exchange rows per rank, whatever the tokens.
    rings = 4 * (num_nodes - 1) * config.ring_bytes
    rows = 2 * (8 * num_nodes + 1) * _native.exchange_row_bytes(8 * num_nodes, num_nodes, config.num_experts)
    assert rings + rows < plan.registered_bytes < rings + rows + 1024 * 8 * num_nodes
    assert rings <= plan.ring_bytes < rings + 4096 + 64 * 8 * num_nodes
    assert forecast(replace(config, max_tokens=64), plan.topology, rates).registered_bytes == plan.registered_bytes


def test_rings_hold_what_is_in_flight() -> None:
    ring = plan_ring(512 << 10, 64 << 10, 7536, 4096)
    assert (ring.slots_per_chunk, ring.num_chunks) == (8, 8)
    assert plan_ring(512 << 10, 64 << 10, 7536, 9).slots_per_chunk == 2
    assert plan_ring(512 << 10, 64 << 10, 100_000, 4096).slots_per_chunk == 1


def test_more_fan_out_gets_more_multiprocessors() -> None:
    config = RuntimeConfig(hidden=7168, num_experts=64, num_topk=8, num_sms=24)
    slow, fast = (plan_launch(config, Topology.uniform(64, 8), LinkRates(scale_out=rate)) for rate in (25e9, 200e9))
    assert (slow.out_blocks, slow.num_blocks) == (1, 24) and slow.in_blocks >= 1
    assert fast.out_blocks > slow.out_blocks and fast.in_blocks > slow.in_blocks and fast.num_blocks == 24
    with pytest.raises(ConfigError, match="num_sms=2 is below 3"):
        plan_launch(replace(config, num_sms=2), Topology.uniform(64, 8))
    with pytest.raises(ConfigError, match=r"33 \+ 32 blocks serve the network, at most 64 can"):
        plan_launch(replace(config, num_sms=132, out_blocks=33, in_blocks=32), Topology.uniform(64, 8))
    many = plan_launch(replace(config, num_sms=132, out_blocks=60), Topology.uniform(64, 8))
    assert many.out_blocks + many.most_in_blocks <= 64


def test_the_load_of_a_call_decides_how_many_forward() -> None:
    config = RuntimeConfig(hidden=7168, num_experts=64, num_topk=8, num_sms=24)
    plan = plan_launch(config, Topology.uniform(64, 8))
    rows = 4096
    assert plan.in_blocks_for(0, 0) == 0
    traffic = expected_traffic(Topology.uniform(64, 8), num_tokens=rows, num_topk=8, num_experts=64)
    balanced = round(traffic.received_out), round((traffic.stored_up + traffic.stored_here) * 7 / 8)
    assert plan.in_blocks_for(*balanced) == plan.in_blocks == 2
    found = [plan.in_blocks_for(rows, rows * fan_out) for fan_out in range(1, 9)]
    assert found == sorted(found) and found[0] < found[-1] <= plan.most_in_blocks < 24 - plan.out_blocks
    # As native/tests/ring_test.cc has it.
    fixed = replace(plan, blocks_per_copy=2.0, most_in_blocks=7)
    assert [fixed.in_blocks_for(*each) for each in ((100, 100), (100, 101), (100, 150), (100, 800), (3, 1))] == [
        2, 3, 3, 7, 1,
    ]  # fmt: skip
    given = plan_launch(replace(config, in_blocks=12, out_blocks=11), Topology.uniform(64, 8))
    assert (given.out_blocks, given.in_blocks, given.most_in_blocks) == (11, 12, 12)
    assert given.in_blocks_for(*balanced) == 12


def test_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--nodes", "8", "256", "--nic-gbytes", "25"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3 and out[0].startswith("calculated, not measured") and "85% of them left to compute" in out[0]
    assert out[1].startswith("8 nodes, 64 ranks, 256 experts") and out[2].startswith("256 nodes, 2048 ranks, 2048")
    assert "112 MiB registered, 112 MiB of them rings;" in out[1]
    assert main(["plan", "--nodes", "0"]) == 1
