"""The native side of an executor whose workers are kernels: registered memory, proxy thread and transport."""

from __future__ import annotations

from typing import Any

from commlib import _native
from commlib.bootstrap import Bootstrap
from commlib.bootstrap.agreement import allgather_or_raise
from commlib.config import RuntimeConfig
from commlib.env import read_env
from commlib.topology import Topology
from commlib.transport import transport_options

__all__ = ["open_fabric"]

_MAX_TAIL_BYTES = 1024  # what travels behind a row, at most


def open_fabric(
    boot: Bootstrap,
    config: RuntimeConfig,
    topology: Topology,
    *,
    exchange_row_bytes: int,
    num_writers: int,
    cpus: list[int],
    timeout_s: float,
) -> Any:
    """A connected native Fabric that has not been started. Collective.

    Args:
        boot, config, topology: of the Runtime.
        exchange_row_bytes: of what ranks tell each other before an operation.
        num_writers: blocks of a kernel that give commands.
        cpus: on which proxy threads may run; none: on all.
        timeout_s: seconds within which all ranks must come.

    Raises:
        ConfigError, CapacityError, TransportError: on all ranks.
    """
    native = _native.FabricConfig()
    native.rank, native.node_of_rank = boot.rank, list(topology.node_of_rank)
    native.num_experts, native.num_writers = config.num_experts, num_writers
    native.num_proxy_threads, native.proxy_cpus = config.num_proxy_threads, cpus
    native.exchange_row_bytes, native.ring_bytes = exchange_row_bytes, config.ring_bytes
    native.largest_put = max(config.chunk_bytes, 4 * config.hidden + _MAX_TAIL_BYTES)
    native.heartbeat_timeout_s, native.transport = config.heartbeat_timeout_s, config.transport
    native.transport_options = transport_options(read_env())
    native.config_digest = config.digest() ^ hash(topology.node_of_rank) & (2**63 - 1)
    fabric: Any = None

    def build() -> bytes:
        nonlocal fabric
        fabric = _native.Fabric(native)
        address: bytes = fabric.address()
        return address

    def connect() -> bytes:
        fabric.connect(addresses)
        return b""

    addresses = allgather_or_raise(boot, build, timeout_s=timeout_s)
    # Nobody may go on (or away) before the slowest has mapped everybody's memory.
    allgather_or_raise(boot, connect, timeout_s=timeout_s)
    return fabric
