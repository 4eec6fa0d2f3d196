"""Who does what in a two-tier operation: how many multiprocessors per role, how large a chunk, how deep a ring."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from commlib.config import RuntimeConfig
from commlib.errors import ConfigError
from commlib.layout import SCALE_BLOCK, align_up, record_bytes
from commlib.topology import Topology
from commlib.traffic import Traffic, expected_traffic

__all__ = [
    "DispatchSlot",
    "LaunchPlan",
    "LinkRates",
    "RingPlan",
    "combine_slot_bytes",
    "dispatch_slot",
    "plan_launch",
    "plan_ring",
]

_MOST_WRITERS = 64  # of commands to the network, besides the exchange: kMaxFabricFifos has room for their FIFOs
_UNIT = 16  # bytes in which commands address registered memory
_PER_COPY_UNIT = 256  # of blocks, kPerCopyUnit in native/channel/role_blocks.hpp
_INDEX_BYTES = 4  # behind the record, per slot of the token: which record of the expert's rank it is


@dataclass(frozen=True, kw_only=True)
class LinkRates:
    """Bytes per second of one rank.

    Attributes:
        scale_out: of its network card.
        scale_up: of its link to the other GPUs of the node.
        multiprocessor: that one multiprocessor can store (62 GB/s on an H200, docs/performance.md).
    """

    scale_out: float = 50e9
    scale_up: float = 365e9
    multiprocessor: float = 62e9


@dataclass(frozen=True, kw_only=True)
class RingPlan:
    """A scale-out ring during one operation. The same arithmetic as make_ring in native/channel/ring.hpp.

    Attributes:
        slot_bytes: of one token.
        slots_per_chunk: tokens of one put.
        num_chunks: that the ring holds.
    """

    slot_bytes: int
    slots_per_chunk: int
    num_chunks: int


class DispatchSlot(NamedTuple):
    """A token on its way between nodes: row, scales of an FP8 row, record, record numbers. Offsets in bytes."""

    scales_offset: int
    record_offset: int
    slot_bytes: int


def dispatch_slot(hidden: int, num_topk: int, element_bytes: int, *, is_fresh: bool = True) -> DispatchSlot:
    """What a slot holds; by handle (not `is_fresh`) no record."""
    scales_offset = hidden * element_bytes
    scales_bytes = 4 * (hidden // SCALE_BLOCK) if element_bytes == 1 else 0
    record_offset = align_up(scales_offset, _UNIT) + align_up(scales_bytes, _UNIT)
    tail_bytes = record_bytes(num_topk) + _INDEX_BYTES * num_topk if is_fresh else 0
    return DispatchSlot(scales_offset, record_offset, align_up(record_offset + tail_bytes, _UNIT))


def combine_slot_bytes(hidden: int, num_topk: int, element_bytes: int, *, has_grads: bool) -> int:
    """Bytes of a token on its way back: row, gradients of the routing weights."""
    return align_up(hidden * element_bytes + (4 * num_topk if has_grads else 0), _UNIT)


def plan_ring(ring_bytes: int, chunk_bytes: int, slot_bytes: int, num_slots: int) -> RingPlan:
    """Chunks of at most `chunk_bytes`, at least four for a message of `num_slots`, at least one slot each."""
    per_chunk = max(1, min(chunk_bytes // slot_bytes, num_slots // 4))
    return RingPlan(slot_bytes=slot_bytes, slots_per_chunk=per_chunk, num_chunks=ring_bytes // (per_chunk * slot_bytes))


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """Blocks (one per multiprocessor) of a two-tier kernel, by what they do first; all help with local work then.

    Attributes:
        num_blocks: of the kernel. Those that do not serve the network push, expand, reduce and final_reduce at once.
        out_blocks: serve own tokens on their way to other nodes (scale_out_send) and back (receive).
        in_blocks: serve tokens of other nodes (forward, in combine forward_reduce), in balanced routing.
        most_in_blocks: likewise, when each row is wanted by more ranks than in balanced routing.
        blocks_per_copy: in_blocks for one row written here per row that comes from another node.
    """

    num_blocks: int
    out_blocks: int
    in_blocks: int
    most_in_blocks: int
    blocks_per_copy: float

    @property
    def in_per_copy(self) -> int:
        """`blocks_per_copy` in the unit of kernels."""
        return max(1, round(_PER_COPY_UNIT * self.blocks_per_copy))

    def in_blocks_for(self, rows: int, copies: int) -> int:
        """Blocks that serve tokens of other nodes when `rows` come and `copies` are written here.

        As role_blocks in native/channel/role_blocks.hpp has it, which kernels ask.
        """
        if rows == 0:
            return 0
        return max(1, min(-(-copies * self.in_per_copy // (rows * _PER_COPY_UNIT)), self.most_in_blocks))

    def kernel_fields(self) -> dict[str, int]:
        """What TierCall in native/cuda/params.cuh has of this."""
        return {
            "out_blocks": self.out_blocks,
            "most_in_blocks": self.most_in_blocks,
            "in_per_copy": self.in_per_copy,
        }

    def describe(self) -> str:
        return (
            f"of {self.num_blocks} SMs {self.out_blocks} serve own tokens, {self.in_blocks} (by load 1 to "
            f"{self.most_in_blocks}) those of other nodes, the rest and whoever is through does local work"
        )


def plan_launch(config: RuntimeConfig, topology: Topology, rates: LinkRates | None = None) -> LaunchPlan:
    """Enough blocks to keep the network busy, the rest for local work.

    A block that takes rows in stores each of them at every rank of the node that wants it, so the fan-out decides how
    many of those there are: that of balanced routing here, that of the call in the kernels. Not more than a third of
    all blocks for either way, at least one, and no more than there are other nodes. What `config` says of them stands.

    Raises:
        ConfigError: fewer than three multiprocessors, none left for local work, or more than 64 for the network.
    """
    rates = rates or LinkRates()
    if config.num_sms < 3:
        raise ConfigError(
            f"num_sms={config.num_sms} is below 3: between nodes one sends, one takes in, one does the rest"
        )
    traffic = _balanced(config, topology)
    nodes = max(topology.num_nodes, 2)
    fan_out = max((traffic.stored_up + traffic.stored_here) / max(traffic.sent_out * nodes / (nodes - 1), 1.0), 1.0)
    most = max(1, min(config.num_sms // 3, topology.num_nodes - 1))
    out_blocks = config.out_blocks or max(1, min(most, math.ceil(rates.scale_out / rates.multiprocessor)))
    # A share of balanced routing's own blocks, half a block below their number: sampled routing is near it.
    per_copy = (config.in_blocks - 0.5) / fan_out if config.in_blocks else rates.scale_out / rates.multiprocessor
    in_blocks = config.in_blocks or max(1, min(most, math.ceil(per_copy * fan_out)))
    if out_blocks + in_blocks >= config.num_sms:
        raise ConfigError(f"{out_blocks} + {in_blocks} blocks leave none of num_sms={config.num_sms} for local work")
    most_in_blocks = config.in_blocks or max(
        in_blocks, min(most, config.num_sms - out_blocks - 1, _MOST_WRITERS - out_blocks)
    )
    if out_blocks + most_in_blocks > _MOST_WRITERS:
        raise ConfigError(f"{out_blocks} + {most_in_blocks} blocks serve the network, at most {_MOST_WRITERS} can")
    return LaunchPlan(
        num_blocks=config.num_sms,
        out_blocks=out_blocks,
        in_blocks=in_blocks,
        most_in_blocks=most_in_blocks,
        blocks_per_copy=per_copy,
    )


def _balanced(config: RuntimeConfig, topology: Topology) -> Traffic:
    """Nodes may differ: then as if they all had the ranks of the largest."""
    largest = max(len(topology.ranks_of_node(node)) for node in range(topology.num_nodes))
    even = Topology.uniform(largest * topology.num_nodes, largest)
    num_experts = align_up(config.num_experts, even.num_ranks)
    return expected_traffic(even, num_tokens=config.max_tokens, num_topk=config.num_topk, num_experts=num_experts)
