"""Several nodes: what the kernels get of the native fabric, and what its faults mean here."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from commlib.bootstrap import Bootstrap
from commlib.bootstrap.agreement import allgather_or_raise
from commlib.config import RuntimeConfig
from commlib.cuda.driver import map_host_memory, unmap_host_memory
from commlib.errors import CommError, CommTimeout, PeerLostError, TransportError
from commlib.launch_plan import LaunchPlan
from commlib.topology import Topology

__all__ = ["Tiers"]

_TIMEOUT, _PEER_LOST = 1, 2  # FaultKind in native/common/fault.hpp


class Tiers:
    """The native fabric of one rank, with its memory mapped for the device. Construction is collective.

    Words and rows that ranks tell each other lie in pinned host memory: every transport can write there, and nobody
    needs to flush GPU memory to see a word. Rings lie there, too, or in GPU memory (`RuntimeConfig.ring_memory`).

    Args:
        buffers: of this rank, with the word in pinned memory that ends its kernels' waits.

    Attributes:
        plan: which blocks serve the network.
        view: device memory that holds the DeviceFabric of native/channel/device_fabric.hpp.
        registered_bytes: that the network writes and reads.
        puts_call_driver: the proxy's puts are calls of the CUDA driver (rings in GPU memory over UCX), so that whoever
            keeps others out of the driver until a kernel has ended (a copy between pageable memory and the device)
            keeps out the puts that this kernel waits for.

    Raises:
        ConfigError, CapacityError, TransportError: a rank's memory, connections or driver refuse; on all ranks.
    """

    view: Any
    registered_bytes: int

    def __init__(
        self,
        boot: Bootstrap,
        config: RuntimeConfig,
        topology: Topology,
        plan: LaunchPlan,
        exchange_row_bytes: int,
        buffers: Any,
        timeout_s: float,
        cpus: list[int],
    ) -> None:
        from commlib.cuda.rings import open_with_rings  # here: one node needs no native core
        from commlib.fabric import open_fabric, ring_memory_bytes

        self.rank, self.topology, self.plan = boot.rank, topology, plan
        self._buffers = buffers  # the proxy threads write there
        connect = partial(
            open_fabric,
            boot,
            config,
            topology,
            exchange_row_bytes=exchange_row_bytes,
            stop_address=buffers.stop_address,
            num_writers=1 + plan.out_blocks + plan.most_in_blocks,
            cpus=cpus,
            timeout_s=timeout_s,
        )
        ring_bytes = ring_memory_bytes(boot.rank, config, topology)
        self._fabric: Any
        self._fabric, self._rings, self._ring_text = open_with_rings(
            boot,
            config.ring_memory,
            ring_bytes,
            config.transport == "verbs",
            lambda place: connect(rings=place),
            timeout_s,
        )
        self.puts_call_driver = self._rings is not None and config.transport != "verbs"
        self._transport_text: str = self._fabric.describe_transport()
        self._counters: dict[str, Any] = {}
        self._mapped: list[int] = []
        self.registered_bytes = 0 if self._rings is None else ring_bytes
        allgather_or_raise(boot, lambda: self._map(config.chunk_bytes), timeout_s=timeout_s)

    def _map(self, chunk_bytes: int) -> bytes:
        pieces = (self._fabric.registered(), self._fabric.fifos(), self._fabric.completions())
        addresses = []
        for address, num_bytes in pieces:
            there, is_ours = map_host_memory(address, num_bytes)
            addresses.append(there)
            if is_ours:
                self._mapped.append(address)
        self.registered_bytes += int(pieces[0][1])
        view = self._fabric.device_view(*addresses, chunk_bytes)
        self.view = torch.frombuffer(bytearray(view), dtype=torch.uint8).cuda()
        torch.cuda.current_stream().synchronize()
        return b""

    @staticmethod
    def wait_for_puts(kernel_end: Any, check_faults: Callable[[], None], limit_s: float) -> bool:
        """Where `puts_call_driver`: until the kernel has ended, so that its caller cannot keep its puts out. False: it
        has not within the limit, though each of its waits has a shorter one. Raises what `check_faults` does, which
        ends kernels that would wait for a lost peer."""
        limit = time.monotonic() + limit_s
        while not kernel_end.has_passed():
            check_faults()
            if time.monotonic() > limit:
                return False
            time.sleep(2e-5)
        check_faults()
        return True

    @property
    def has_device_rings(self) -> bool:
        """Whether rings lie in GPU memory."""
        return self._rings is not None

    @property
    def num_nodes(self) -> int:
        return self.topology.num_nodes

    @property
    def num_in_sources(self) -> int:
        return len(self.topology.in_sources(self.rank))

    def counters(self) -> dict[str, Any]:
        if self._fabric is not None:
            self._counters = self._fabric.counters()
        return self._counters

    def describe(self) -> str:
        return f"scale-out: {self._transport_text}; rings in {self._ring_text}; {self.plan.describe()}"

    def fault(self) -> CommError | None:
        """What the proxy or another rank has found."""
        record = None if self._fabric is None else self._fabric.fault()
        return None if record is None else _error_of(record, self.rank)

    def tell(self, note: Any, phase: str, timeout_s: float) -> None:
        """A kernel of this node has missed a deadline: other nodes hear of it."""
        if self._fabric is None:
            return
        self._fabric.raise_timeout(
            note.rank, note.peer, note.epoch, note.expected, note.seen, phase, f"no progress for {timeout_s:g} s"
        )

    def tell_lost(self, peer: int) -> None:
        """The process of a rank of this node has ended."""
        self._fabric.raise_lost(peer)

    def tell_left(self) -> None:
        """This rank leaves without the others."""
        self._fabric.raise_left()

    def close(self, *, is_quiet: bool) -> None:
        """No kernel gives commands any more."""
        if self._fabric is None:
            return
        self.counters()
        self._fabric.stop(is_quiet)
        while self._mapped:
            unmap_host_memory(self._mapped.pop())
        self._fabric = None  # its memory goes now, not when a collector finds this object
        if self._rings is not None:
            self._rings.release(is_quiet=is_quiet)


def _error_of(fault: dict[str, Any], rank: int) -> CommError:
    peer, phase, channel = fault["peer"], fault["phase"], f"{fault['channel']} -> {fault['rank']}"
    noticed = f"rank {fault['rank']} noticed it in {phase}; seen by rank {rank}"
    if fault["kind"] == _TIMEOUT:
        return CommTimeout(
            f"rank {fault['rank']} waited for rank {peer} in {phase} on channel {channel}, epoch {fault['tag']}: "
            f"expected {fault['expected']}, seen {fault['seen']}; {fault['detail']}; noticed by rank {rank}",
            rank=fault["rank"], peer=peer if peer >= 0 else None, channel=channel, phase=phase, tag=fault["tag"],
            expected=fault["expected"], seen=fault["seen"],
        )  # fmt: skip
    if fault["kind"] == _PEER_LOST:
        return PeerLostError(
            f"rank {peer} is lost: {fault['detail']}; {noticed}", rank=fault["rank"], peer=peer, channel=channel,
            phase=phase,
        )  # fmt: skip
    return TransportError(
        f"transport failed: {fault['detail']}; {noticed}", call=phase, code=fault["code"],
        peer=peer if peer >= 0 else None,
    )  # fmt: skip
