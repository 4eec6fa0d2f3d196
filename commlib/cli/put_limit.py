"""What the transport itself reaches between the same ranks: plain puts of the lower bound's bytes."""

from __future__ import annotations

import json

from commlib import _native
from commlib.bootstrap import Bootstrap
from commlib.config import RuntimeConfig
from commlib.env import read_env
from commlib.runtime import Runtime
from commlib.transport import transport_options

__all__ = ["PutLimit", "put_ways"]


def put_ways(config: RuntimeConfig) -> dict[str, tuple[int, int]]:
    """Bytes of a put and puts in flight: as our rings do it, and large with much in flight. The faster one counts."""
    return {"chunk": (config.chunk_bytes, config.ring_bytes // config.chunk_bytes), "large": (256 << 10, 16)}


class PutLimit:
    """Plain puts of as many bytes as dispatch (to the rails) or combine (home) must carry at least.

    Args:
        boot: the Runtime's ranks.
        runtime: for its topology and transport.
        lower_bound: [node] bytes from this rank.
        message_bytes: size of a put.
        window: puts in flight.
        messages: address of device memory for `message_bytes * window`; 0: in host memory.
    """

    def __init__(
        self,
        boot: Bootstrap,
        runtime: Runtime,
        lower_bound: list[int],
        message_bytes: int,
        window: int,
        messages: int = 0,
    ) -> None:
        topology, config, rank = runtime.topology, runtime.config, runtime.rank
        self._boot = boot
        self._timeout_s = config.timeout_s
        options = transport_options(read_env())
        options.node = topology.node(rank)
        options.local_rank = topology.local_rank(rank)
        self._probe = _native.GoodputProbe(config.transport, rank, boot.size, message_bytes, window, options, messages)
        addresses = boot.allgather(self._probe.address(), timeout_s=self._timeout_s)
        for peer in topology.scale_out_peers(rank):
            self._probe.connect(peer, addresses[peer])
        blobs = boot.allgather(json.dumps(lower_bound).encode(), timeout_s=self._timeout_s)
        bounds = [json.loads(blob) for blob in blobs]
        node = topology.node(rank)
        nodes = [n for n in range(topology.num_nodes) if n != node]
        self._rails = [topology.rail(rank, n) for n in nodes]
        self._out = [lower_bound[n] for n in nodes]
        self._in_sources = list(topology.in_sources(rank))
        self._home = [bounds[source][node] for source in self._in_sources]
        self._round = 0

    def seconds(self, *, is_combine: bool) -> float:
        """Time of one direction; collective."""
        self._round += 1
        self._boot.barrier(self._timeout_s)
        targets, sizes, sources = (
            (self._in_sources, self._home, self._rails) if is_combine else (self._rails, self._out, self._in_sources)
        )
        # A rail can serve several sources, and a source several rails: one stream for each pair.
        return float(self._probe.run(targets, sizes, sources, self._round, self._timeout_s))

    def close(self) -> None:
        """Leaves together, so that nobody loses a peer."""
        self._boot.barrier(self._timeout_s)
        del self._probe
