"""The Runtime: dispatch and combine for one expert-parallel group."""

from __future__ import annotations

import itertools
import json
import logging
import weakref
from types import TracebackType
from typing import Any

from commlib import _native  # before the bootstrap loads an MPI, which may bring an older UCX of its own
from commlib import bootstrap as _bootstrap
from commlib.bootstrap.agreement import allgather_or_raise, require_equal
from commlib.config import RuntimeConfig
from commlib.env import Env, read_env
from commlib.errors import ConfigError
from commlib.faults import error_of
from commlib.handle import Combined, Dispatched, Handle
from commlib.layout import Layout, default_arena_bytes
from commlib.memory import MemoryReport
from commlib.pending import PendingCombine, PendingDispatch, prepare_combine, prepare_dispatch
from commlib.topology import Topology, node_key

__all__ = ["Runtime"]

_logger = logging.getLogger("commlib")
_ids = itertools.count()


class Runtime:
    """Dispatch and combine among the ranks of one group.

    Construction is collective. So is every operation: all ranks issue the operations of one Runtime in the same order,
    also those that have no tokens. Several Runtimes in one process do not disturb each other. Not thread-safe: one
    thread at a time issues operations.

    Args:
        group: the ranks: an mpi4py communicator, a torch ProcessGroup, a 1-D DeviceMesh, a `commlib.bootstrap`
            Bootstrap, or None to find out (mpirun, torchrun, `COMMLIB_RENDEZVOUS`, else one rank alone).
        config: shape and limits; environment variables override timeouts, threads and transport.
        topology: which rank sits on which node; None = found out, or `COMMLIB_RANKS_PER_NODE`.
        connect_timeout_s: seconds within which all ranks must have arrived.

    Raises:
        ConfigError: ranks disagree, or sizes do not fit together.
        CapacityError: /dev/shm or the locked-memory limit is too small.
        CommTimeout: a rank did not arrive; names it.
    """

    def __init__(
        self,
        group: Any = None,
        config: RuntimeConfig | None = None,
        *,
        topology: Topology | None = None,
        connect_timeout_s: float = 60.0,
    ) -> None:
        if config is None:
            raise ConfigError("Runtime needs a RuntimeConfig with at least hidden, num_experts and num_topk")
        env = read_env()
        self.config = config.with_env(env)
        boot = _bootstrap.connect(group, env=env, timeout_s=connect_timeout_s)
        try:
            self.rank: int = boot.rank
            self.num_ranks: int = boot.size
            self.topology = _agree_on_topology(boot, self.config, topology, env, connect_timeout_s)
            self._engine = _connect_engine(boot, self.config, self.topology, connect_timeout_s)
            self._bootstrap_text = boot.describe()
        finally:
            if boot is not group:
                boot.close()
        self._id = next(_ids)
        self._is_closed = False
        # The native core uses the arrays of an operation until it is over, also if the caller drops what it was given.
        self._in_flight: list[PendingDispatch | PendingCombine] = []
        # A Runtime that is dropped, or a process that ends, must not leave peers waiting for it.
        self._finalizer = weakref.finalize(self, _abandon, self._engine)
        _logger.info("rank %d: %s", self.rank, self.describe())

    # ---- dispatch

    def dispatch(
        self,
        x: Any,
        topk_idx: Any = None,
        topk_weights: Any = None,
        *,
        scales: Any = None,
        handle: Handle | None = None,
        layout: Layout | str = Layout.GROUPED,
        expert_alignment: int | None = None,
        fp8: str | None = None,
    ) -> Dispatched:
        """Carries every token to the ranks of its experts.

        Args:
            x: [num_tokens, hidden] FP32, BF16, or E4M3 with `scales`; `num_tokens` may differ between ranks and be 0.
            topk_idx: int64 [num_tokens, num_topk] expert ids, -1 = no expert in this slot, no expert twice in a row.
            topk_weights: FP32 [num_tokens, num_topk]; None = ones.
            scales: FP32 [num_tokens, hidden / 128] of FP8 rows.
            handle: repeat the routing of an earlier dispatch (no `topk_idx`); only rows and scales are returned.
            layout: "grouped" (expert-major) or "rows" (one row per token and rank).
            expert_alignment: grouped: pad each expert's rows to a multiple; None = that of the config.
            fp8: cast rows to E4M3 on the way: "fp32" (1x128 scales amax / 448) or "pow2" (rounded up to powers of two).

        Returns:
            Dispatched, in the order of docs/design.md section 3.

        Raises:
            ConfigError: a rank's input is bad or ranks disagree; on every rank, in this call; the Runtime stays usable.
            CapacityError: a rank has no room for its rows; on every rank; the Runtime stays usable.
            CommTimeout, PeerLostError, TransportError: the Runtime is of no further use; close it and build another.
        """
        return self.dispatch_recv(
            self.dispatch_send(
                x,
                topk_idx,
                topk_weights,
                scales=scales,
                handle=handle,
                layout=layout,
                expert_alignment=expert_alignment,
                fp8=fp8,
            )
        )

    def dispatch_send(
        self,
        x: Any,
        topk_idx: Any = None,
        topk_weights: Any = None,
        *,
        scales: Any = None,
        handle: Handle | None = None,
        layout: Layout | str = Layout.GROUPED,
        expert_alignment: int | None = None,
        fp8: str | None = None,
    ) -> PendingDispatch:
        """First half of `dispatch`: starts it and returns at once (once there is room for it, see
        `max_in_flight`). The arrays must not change until `dispatch_recv`.
        """
        self._check_open()
        pending = prepare_dispatch(
            self._engine,
            self.config,
            self._id,
            x,
            topk_idx,
            topk_weights,
            scales=scales,
            handle=handle,
            layout=layout,
            expert_alignment=self.config.expert_alignment if expert_alignment is None else expert_alignment,
            fp8=fp8,
        )
        self._start(pending)
        return pending

    def dispatch_recv(self, pending: PendingDispatch) -> Dispatched:
        """Second half of `dispatch`: waits for it."""
        self._check_pending(pending, PendingDispatch)
        self._wait(pending.op)
        return pending.result()

    # ---- combine

    def combine(self, y: Any, handle: Handle, *, weights: Any = None, weight_grads: Any = None) -> Combined:
        """Brings the experts' outputs home: one sum per token, in fixed order.

        Args:
            y: [num_rows, hidden] FP32 or BF16, in the order of the dispatch's rows.
            handle: of the dispatch.
            weights: FP32 [num_rows]: each row is multiplied by its weight. None: rows are summed as they are.
            weight_grads: FP32 [num_rows] (grouped) or [num_rows, num_topk] (rows): carried home to the slots they
                belong to, for the gradient of the routing weights. On all ranks or on none.

        Returns:
            Combined, in the dtype of `y`.

        Raises:
            Like `dispatch`.
        """
        return self.combine_recv(self.combine_send(y, handle, weights=weights, weight_grads=weight_grads))

    def combine_send(self, y: Any, handle: Handle, *, weights: Any = None, weight_grads: Any = None) -> PendingCombine:
        """First half of `combine`: starts it and returns at once (once there is room for it, see
        `max_in_flight`). The arrays must not change until `combine_recv`.
        """
        self._check_open()
        pending = prepare_combine(
            self._engine, self.config, self._id, y, handle, weights=weights, weight_grads=weight_grads
        )
        self._start(pending)
        return pending

    def combine_recv(self, pending: PendingCombine) -> Combined:
        """Second half of `combine`: waits for it."""
        self._check_pending(pending, PendingCombine)
        self._wait(pending.op)
        return pending.result()

    # ---- the rest

    def barrier(self) -> None:
        """Returns when all ranks have called it. An operation like the others."""
        self._check_open()
        self._wait(self._engine.barrier())

    def counters(self) -> dict[str, Any]:
        """What this rank has moved since construction.

        Keys: ``payload_bytes`` (row and scale bytes posted to the transport), ``data_bytes`` (with records and
        gradients), ``exchange_bytes``, ``commands``, ``signals``, and ``roles``: per role ``rows``, ``bytes_read`` and
        ``bytes_written``.
        """
        counters: dict[str, Any] = self._engine.counters()
        roles = counters["roles"]
        counters["payload_bytes"] = sum(
            roles[name]["bytes_written"] for name in ("scale_out_send", "forward_reduce") if name in roles
        )
        return counters

    def memory(self) -> MemoryReport:
        """Bytes that this rank holds now."""
        return MemoryReport(**self._engine.memory())

    def describe(self) -> str:
        """Several lines for logs: who we are, how ranks met, what carries the bytes."""
        return (
            f"commlib rank {self.rank} of {self.num_ranks} on {self.topology.num_nodes} nodes, "
            f"{self._bootstrap_text}\nscale-out: {self._engine.describe_transport()}\nmemory: {self.memory()}"
        )

    def close(self) -> None:
        """Barrier among all ranks, then frees everything. Idempotent; after a fault it waits for nobody.

        Rows that were handed out stay valid.

        Raises:
            CommTimeout, PeerLostError, TransportError: the barrier failed; everything is freed all the same.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._finalizer.detach()
        outcome = self._engine.close()
        self._in_flight.clear()
        if outcome.kind.name != "DONE":
            raise error_of(outcome, self.rank)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # the other ranks may never reach their close(): tell them and go
            self._is_closed = True
            self._finalizer()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ConfigError("this Runtime is closed")

    def _check_pending(self, pending: Any, kind: type[PendingDispatch | PendingCombine]) -> None:
        if not isinstance(pending, kind) or pending.runtime_id != self._id:
            raise ConfigError(f"{type(pending).__name__} is not a {kind.__name__} of this Runtime")

    def _start(self, pending: PendingDispatch | PendingCombine) -> None:
        """Submits; kept first, so that an interrupt in between cannot free what the native core uses."""
        self._in_flight.append(pending)
        pending.op = pending.submit()

    def _wait(self, op: Any) -> None:
        outcome = op.wait()
        self._in_flight = [pending for pending in self._in_flight if not pending.is_finished()]
        if outcome.kind.name != "DONE":
            raise error_of(outcome, self.rank)


def _abandon(engine: Any) -> None:
    engine.abandon()


def _agree_on_topology(
    boot: _bootstrap.Bootstrap, config: RuntimeConfig, topology: Topology | None, env: Env, timeout_s: float
) -> Topology:
    """Raises on all ranks alike if a rank's numbers do not fit or ranks were told different things."""

    def tell() -> bytes:
        given = topology
        if given is None and env.ranks_per_node is not None:
            given = Topology.uniform(boot.size, env.ranks_per_node)
        if given is not None and given.num_ranks != boot.size:
            raise ConfigError(f"topology has {given.num_ranks} ranks, the group has {boot.size}")
        config.check_ranks(boot.size)
        nodes = "found out" if given is None else list(given.node_of_rank)
        return json.dumps({"must agree": {**config.shared(), "topology": nodes}, "node": node_key()}).encode()

    told = [json.loads(blob) for blob in allgather_or_raise(boot, tell, timeout_s=timeout_s)]
    require_equal([each["must agree"] for each in told])
    nodes = told[0]["must agree"]["topology"]
    keys = [each["node"] for each in told]
    if nodes == "found out":
        return Topology.from_node_keys(keys)
    given = Topology(tuple(nodes))
    for ranks in map(given.ranks_of_node, range(given.num_nodes)):
        for rank in ranks:
            if keys[rank] != keys[ranks[0]]:
                raise ConfigError(
                    f"ranks {ranks[0]} and {rank} are declared to share node {given.node(rank)}, but cannot share "
                    f"memory: {keys[ranks[0]]} and {keys[rank]}"
                )
    return given


def _connect_engine(boot: _bootstrap.Bootstrap, config: RuntimeConfig, topology: Topology, timeout_s: float) -> Any:
    native = _native.EngineConfig()
    native.rank = boot.rank
    native.node_of_rank = list(topology.node_of_rank)
    for name in (
        "hidden",
        "num_experts",
        "num_topk",
        "num_threads",
        "chunk_tokens",
        "chunk_bytes",
        "ring_bytes",
        "max_arena_bytes",
        "max_in_flight",
        "timeout_s",
        "heartbeat_timeout_s",
        "transport",
    ):
        setattr(native, name, getattr(config, name))
    native.arena_bytes = (
        config.arena_bytes if config.arena_bytes is not None else default_arena_bytes(config, topology, boot.rank)
    )
    native.config_digest = config.digest() ^ hash(topology.node_of_rank) & (2**63 - 1)
    return _build_engine(boot, native, timeout_s)


def _build_engine(boot: _bootstrap.Bootstrap, native: Any, timeout_s: float) -> Any:
    engine: Any = None

    def build() -> bytes:
        nonlocal engine
        engine = _native.Engine(native)
        address: bytes = engine.address()
        return address

    def connect() -> bytes:
        engine.connect(addresses)
        return b""

    try:
        addresses = allgather_or_raise(boot, build, timeout_s=timeout_s)
        # Nobody may go on (or away) before the slowest has mapped everybody's memory.
        allgather_or_raise(boot, connect, timeout_s=timeout_s)
    except BaseException:
        if engine is not None:
            engine.abandon()
        raise
    return engine
