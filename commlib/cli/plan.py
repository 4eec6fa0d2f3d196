"""`commlib plan`: what dispatch and combine would take on more nodes, from the Runtime's own arithmetic."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from commlib.cli.bench import ring_options
from commlib.config import RuntimeConfig
from commlib.env import Env
from commlib.errors import ConfigError
from commlib.launch_plan import (
    LaunchPlan,
    LinkRates,
    RingPlan,
    combine_slot_bytes,
    dispatch_slot,
    plan_launch,
    plan_ring,
)
from commlib.layout import align_up, format_bytes
from commlib.topology import Topology
from commlib.traffic import Traffic, expected_traffic
from commlib.tuned_plans import with_built_in_plan

__all__ = ["Forecast", "Step", "add_parser", "forecast", "run"]

_NODES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A dispatch or a combine of one rank.

    Attributes:
        out_bytes: posted to the network, what travels with the rows included.
        out_row_bytes: of these, rows and scales: the lower bound.
        up_bytes: stored at other ranks of the node.
        seconds: what binds, network, scale-up link or stores of the multiprocessors, and one chunk more until the
            first byte is there.
        ring: of the channel to one node.
    """

    out_bytes: float
    out_row_bytes: float
    up_bytes: float
    seconds: float
    ring: RingPlan


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One size of cluster.

    Attributes:
        config: shape; experts may be more than asked for, see `forecast`.
        traffic: rows of a rank.
        launch: multiprocessors by role.
        dispatch, combine: one of each.
        registered_bytes: memory of a rank that the network writes and reads.
        ring_bytes: of these, the rings, which may lie in GPU memory.
    """

    config: RuntimeConfig
    topology: Topology
    traffic: Traffic
    launch: LaunchPlan
    dispatch: Step
    combine: Step
    registered_bytes: int
    ring_bytes: int


def forecast(
    config: RuntimeConfig, topology: Topology, rates: LinkRates, *, fp8: bool = True, max_nodes: int | None = None
) -> Forecast:
    """Every rank sends `config.max_tokens` tokens to experts that are all equally likely.

    Raises:
        ConfigError: experts do not spread evenly over the ranks, or nodes differ in size.
    """
    from commlib import _native  # here: the other subcommands may have none

    traffic = expected_traffic(
        topology,
        num_tokens=config.max_tokens,
        num_topk=config.num_topk,
        num_experts=config.num_experts,
        max_nodes=max_nodes,
    )
    launch = plan_launch(config, topology, rates)
    element = 1 if fp8 else 2
    scales = 4 * (config.hidden // 128) if fp8 else 0
    combine_slot = combine_slot_bytes(config.hidden, config.num_topk, 2, has_grads=False)
    exchange_bytes = _native.exchange_row_bytes(topology.num_ranks, topology.num_nodes, config.num_experts)

    registered_bytes, ring_bytes = _native.registered_bytes(
        0, list(topology.node_of_rank), config.num_experts, config.ring_bytes
    )

    def step(row_bytes: int, slot_bytes: int) -> Step:
        ring = plan_ring(
            config.ring_bytes, config.chunk_bytes, slot_bytes, int(traffic.sent_out / max(topology.num_nodes - 1, 1))
        )
        out = traffic.sent_out * slot_bytes
        up = traffic.stored_up * row_bytes
        stored = (traffic.stored_up + traffic.stored_here + traffic.sent_out) * row_bytes
        # Counts go first: a row from every rank of the own rail, told to the own node by each of its ranks.
        exchange = exchange_bytes * (topology.num_nodes - 1) / rates.scale_out
        binding = max(out / rates.scale_out, up / rates.scale_up, stored / (rates.multiprocessor * launch.num_blocks))
        fill = ring.slots_per_chunk * slot_bytes / rates.scale_out if traffic.sent_out else 0.0
        return Step(
            out_bytes=out,
            out_row_bytes=traffic.sent_out * row_bytes,
            up_bytes=up,
            seconds=binding + fill + exchange,
            ring=ring,
        )

    return Forecast(
        config=config,
        topology=topology,
        traffic=traffic,
        launch=launch,
        dispatch=step(
            config.hidden * element + scales, dispatch_slot(config.hidden, config.num_topk, element).slot_bytes
        ),
        combine=step(config.hidden * 2, combine_slot),
        registered_bytes=registered_bytes,
        ring_bytes=ring_bytes,
    )


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("plan", help="bytes, times and memory on many nodes, by calculation")
    parser.add_argument("--nodes", type=int, nargs="+", default=list(_NODES))
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="per rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=256, help="at least; rounded up to a multiple of the ranks")
    parser.add_argument("--max-nodes", type=int, default=4, help="nodes that a token's experts are on, at most")
    parser.add_argument("--bf16", action="store_true", help="dispatch BF16 rows; default: FP8 with scales")
    parser.add_argument("--num-sms", type=int, default=20)
    parser.add_argument("--gpu-sms", type=int, default=132, help="multiprocessors of a GPU")
    parser.add_argument("--nic-gbytes", type=float, default=50.0, help="GB/s of a rank's network card")
    parser.add_argument("--nvlink-gbytes", type=float, default=365.0, help="GB/s of a rank's stores over NVLink")
    parser.add_argument("--ring-bytes", type=int, default=None, help="default: what GPUs between nodes get")
    parser.add_argument("--chunk-bytes", type=int, default=None, help="likewise")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    rates = LinkRates(scale_out=arguments.nic_gbytes * 1e9, scale_up=arguments.nvlink_gbytes * 1e9)
    if min(rates.scale_out, rates.scale_up) <= 0 or min(arguments.nodes) < 1:
        raise ConfigError("rates and numbers of nodes must be above 0")
    payload = "BF16" if arguments.bf16 else "FP8 with scales"
    print(
        f"calculated, not measured: {arguments.tokens} tokens per rank, hidden {arguments.hidden}, "
        f"top-{arguments.topk}, at most {arguments.max_nodes} nodes per token, dispatch {payload}, combine BF16; per "
        f"rank {arguments.nic_gbytes:g} GB/s scale-out, {arguments.nvlink_gbytes:g} GB/s scale-up; "
        f"{arguments.num_sms} of {arguments.gpu_sms} SMs, "
        f"{1 - arguments.num_sms / arguments.gpu_sms:.0%} of them left to compute all the time"
    )
    for num_nodes in arguments.nodes:
        num_ranks = num_nodes * arguments.ranks_per_node
        config = RuntimeConfig(
            hidden=arguments.hidden,
            num_experts=align_up(arguments.experts, num_ranks),
            num_topk=arguments.topk,
            max_tokens=arguments.tokens,
            num_sms=arguments.num_sms,
            **ring_options(arguments),
        )
        topology = Topology.uniform(num_ranks, arguments.ranks_per_node)
        config = with_built_in_plan(config, "cuda", topology, Env())
        print(_line(forecast(config, topology, rates, fp8=not arguments.bf16, max_nodes=arguments.max_nodes)))
    return 0


def _line(plan: Forecast) -> str:
    steps = "; ".join(
        f"{name} {format_bytes(round(step.out_bytes))} out ({format_bytes(round(step.out_row_bytes))} of rows), "
        f"{format_bytes(round(step.up_bytes))} up, {step.seconds * 1e6:.0f} us, chunks of {step.ring.slots_per_chunk}, "
        f"{step.ring.num_chunks} to a ring"
        for name, step in (("dispatch", plan.dispatch), ("combine", plan.combine))
    )
    return (
        f"{plan.topology.num_nodes} nodes, {plan.topology.num_ranks} ranks, {plan.config.num_experts} experts: "
        f"{steps}; {format_bytes(plan.registered_bytes)} registered, {format_bytes(plan.ring_bytes)} of them rings; "
        f"{plan.launch.describe()}"
    )
