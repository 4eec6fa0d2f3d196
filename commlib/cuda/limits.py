"""What the kernels do not serve."""

from __future__ import annotations

from typing import Any

import torch

from commlib.config import RuntimeConfig
from commlib.cuda.decode import packet_room
from commlib.cuda.launch import MAX_LATENCY_EXPERTS, plan_latency_combine, plan_packets
from commlib.cuda.params import MAX_RANKS, MAX_TOPK
from commlib.errors import ConfigError
from commlib.topology import Topology

__all__ = ["check_limits", "check_multiprocessors"]


def check_limits(config: RuntimeConfig, topology: Topology, num_ranks: int) -> None:
    """Raises ConfigError for more than warps or flags serve."""
    flags = num_ranks * max(map(topology.num_local_ranks, range(num_ranks))) * config.max_tokens
    if topology.num_nodes > 1 and flags >= 2**27:  # Announcer::kNumberBits in native/cuda/bulk.cuh
        raise ConfigError(
            f"max_tokens={config.max_tokens} over {num_ranks} ranks needs {flags} flags, 2^27 are numbered"
        )
    if num_ranks > MAX_RANKS or config.num_topk > MAX_TOPK:
        raise ConfigError(
            f"num_ranks={num_ranks} and num_topk={config.num_topk} exceed what a warp serves: "
            f"{MAX_RANKS} and {MAX_TOPK}"
        )
    if config.decode_tokens is not None and topology.num_nodes == 1:
        _check_latency(config, config.decode_tokens, num_ranks)


def _check_latency(config: RuntimeConfig, decode_tokens: int, num_ranks: int) -> None:
    if config.num_experts > MAX_LATENCY_EXPERTS:
        raise ConfigError(
            f"decode_tokens={decode_tokens} with num_experts={config.num_experts}: choices travel in 12 bits, for up "
            f"to {MAX_LATENCY_EXPERTS} experts"
        )
    plan_latency_combine(2 * config.hidden)
    for is_cast in (False, True):
        plan_packets(2 * config.hidden, packet_room(config, num_ranks), is_cast=is_cast)


def check_multiprocessors(wanted: int, device: Any) -> None:
    """Blocks of a kernel wait for each other, so all of them must be resident: one on each multiprocessor."""
    there = torch.cuda.get_device_properties(device).multi_processor_count
    if wanted > there:
        raise ConfigError(f"num_sms or num_local_sms={wanted} is above the {there} multiprocessors of {device}")
