"""The native side of an executor whose workers are kernels: registered memory, proxy thread and transport."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from commlib import _native
from commlib.bootstrap import Bootstrap
from commlib.bootstrap.agreement import allgather_or_raise
from commlib.config import RuntimeConfig
from commlib.env import read_env
from commlib.topology import Topology
from commlib.transport import transport_options

__all__ = ["RingPlace", "open_fabric", "ring_memory_bytes"]

_MAX_TAIL_BYTES = 1024  # what travels behind a row, at most


class RingPlace(NamedTuple):
    """Device memory for the rings of this rank, which stays what it is until the process ends, unless all ranks have
    agreed to close.

    Attributes:
        address: in this process.
        num_bytes: `ring_memory_bytes`.
        export: gives a dmabuf of the memory, -1 if there is none; None: the transport needs none.
        thread_setup: what a native thread calls to use the device: ThreadSetup of native/proxy/proxy_thread.hpp.
    """

    address: int
    num_bytes: int
    export: Callable[[], int] | None
    thread_setup: tuple[int, int, int, int]


def ring_memory_bytes(rank: int, config: RuntimeConfig, topology: Topology) -> int:
    """Bytes of all rings of a rank."""
    return int(_native.registered_bytes(rank, list(topology.node_of_rank), config.num_experts, config.ring_bytes)[1])


def open_fabric(
    boot: Bootstrap,
    config: RuntimeConfig,
    topology: Topology,
    *,
    exchange_row_bytes: int,
    num_writers: int,
    cpus: list[int],
    timeout_s: float,
    stop_address: int = 0,
    rings: RingPlace | None = None,
) -> Any:
    """A connected native Fabric that has not been started. Collective.

    Args:
        boot, config, topology: of the Runtime.
        exchange_row_bytes: of what ranks tell each other before an operation.
        num_writers: blocks of a kernel that give commands.
        cpus: on which proxy threads may run; none: on all.
        timeout_s: seconds within which all ranks must come.
        stop_address: of a word that becomes 1 with the first fault; 0: none. It outlives the Fabric.
        rings: where rings lie; None: in host memory of the Fabric's own. On all ranks or on none.

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
    native.set_stop_word(stop_address)
    native.config_digest = config.digest() ^ hash(topology.node_of_rank) & (2**63 - 1)
    fabric: Any = None

    def build() -> bytes:
        nonlocal fabric
        fabric = _build(native, rings)
        address: bytes = fabric.address()
        return address

    def connect() -> bytes:
        fabric.connect(addresses)
        return b""

    addresses = allgather_or_raise(boot, build, timeout_s=timeout_s)
    # Nobody may go on (or away) before the slowest has mapped everybody's memory.
    allgather_or_raise(boot, connect, timeout_s=timeout_s)
    return fabric


def _build(native: Any, rings: RingPlace | None) -> Any:
    if rings is None:
        return _native.Fabric(native)
    dmabuf = -1 if rings.export is None else rings.export()
    try:
        native.set_rings(rings.address, rings.num_bytes, dmabuf)
        native.set_thread_setup(*rings.thread_setup)
        return _native.Fabric(native)
    finally:
        if dmabuf >= 0:
            os.close(dmabuf)  # what is registered keeps the memory
