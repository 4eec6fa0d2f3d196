"""The CPU executor: threads of the native core over shared memory and the scale-out transport."""

from __future__ import annotations

from typing import Any

from commlib import _native
from commlib.bootstrap import Bootstrap
from commlib.bootstrap.agreement import allgather_or_raise
from commlib.config import RuntimeConfig
from commlib.env import read_env
from commlib.errors import ConfigError
from commlib.executor import CombineCall, DispatchCall
from commlib.faults import error_of
from commlib.handle import Combined, Dispatched
from commlib.layout import default_arena_bytes
from commlib.memory import MemoryReport
from commlib.pending import PendingCombine, PendingDispatch, prepare_combine, prepare_dispatch, reason_of
from commlib.topology import Topology
from commlib.trace import HostClock, Span, lane_of
from commlib.transport import transport_options

__all__ = ["CpuExecutor"]

# Fields of the native EngineConfig that have the name and the value of the RuntimeConfig's.
_COPIED = (
    "hidden",
    "num_experts",
    "num_topk",
    "num_threads",
    "num_proxy_threads",
    "chunk_tokens",
    "chunk_bytes",
    "ring_bytes",
    "max_arena_bytes",
    "max_in_flight",
    "timeout_s",
    "heartbeat_timeout_s",
    "transport",
)


class CpuExecutor:
    """`Executor` of numpy arrays and CPU tensors. Construction is collective; errors as of `Runtime`."""

    def __init__(
        self, boot: Bootstrap, config: RuntimeConfig, topology: Topology, runtime_id: int, connect_timeout_s: float
    ) -> None:
        self._config, self._rank, self._id = config, boot.rank, runtime_id
        self._engine = _build_engine(boot, config, topology, connect_timeout_s)
        # The native core uses the arrays of an operation until it is over, also if the caller drops what it was given.
        self._in_flight: list[PendingDispatch | PendingCombine] = []
        self._spans: list[Span] | None = None  # while a trace is taken

    def dispatch_send(self, call: DispatchCall) -> PendingDispatch:
        pending = prepare_dispatch(self._engine, self._config, self._id, call)
        self._start(pending)
        return pending

    def dispatch_recv(self, pending: Any) -> Dispatched:
        self._check_pending(pending, PendingDispatch)
        self._wait(pending.op)
        result: Dispatched = pending.result()
        return result

    def dispatch(self, call: DispatchCall) -> Dispatched:
        return self.dispatch_recv(self.dispatch_send(call))

    def combine_send(self, call: CombineCall) -> PendingCombine:
        pending = prepare_combine(self._engine, self._config, self._id, call)
        self._start(pending)
        return pending

    def combine_recv(self, pending: Any) -> Combined:
        self._check_pending(pending, PendingCombine)
        self._wait(pending.op)
        result: Combined = pending.result()
        return result

    def combine(self, call: CombineCall) -> Combined:
        return self.combine_recv(self.combine_send(call))

    def refuse(self, reason: str) -> None:
        self._wait(self._engine.reject(reason_of(ConfigError(reason))))

    def barrier(self) -> None:
        self._wait(self._engine.barrier())

    def check(self) -> None:
        """Calls raise their own errors; what is left is a fault that nobody has met in a call."""
        self._raise_unless_done(self._engine.status())

    def record_stream(self, tensor: Any, stream: Any) -> None:
        """CPU work is done when a call returns."""

    def overflowed(self) -> bool:
        return False

    def counters(self) -> dict[str, Any]:
        counters: dict[str, Any] = self._engine.counters()
        roles = counters["roles"]
        counters["payload_bytes"] = sum(
            roles[name]["bytes_written"] for name in ("scale_out_send", "forward_reduce") if name in roles
        )
        return counters

    def memory(self) -> MemoryReport:
        return MemoryReport(**self._engine.memory())

    def start_trace(self) -> HostClock:
        self._spans = []
        return HostClock()

    def take_trace(self) -> list[Span]:
        spans, self._spans = self._spans, None
        return spans or []

    def describe(self) -> str:
        return f"CPU threads; scale-out: {self._engine.describe_transport()}"

    def close(self) -> None:
        outcome = self._engine.close()
        self._in_flight.clear()
        self._raise_unless_done(outcome)

    def abandon(self) -> None:
        self._engine.abandon()

    def _check_pending(self, pending: Any, kind: type[PendingDispatch | PendingCombine]) -> None:
        if not isinstance(pending, kind) or pending.runtime_id != self._id:
            raise ConfigError(f"{type(pending).__name__} is not a {kind.__name__} of this Runtime")

    def _start(self, pending: PendingDispatch | PendingCombine) -> None:
        """Submits; kept first, so that an interrupt in between cannot free what the native core uses."""
        self._in_flight.append(pending)
        try:
            pending.op = pending.submit()
        except Exception:  # the core has said no, so it uses nothing; an interrupt may have come after it said yes
            self._in_flight.pop()
            raise

    def _wait(self, op: Any) -> None:
        outcome = op.wait()
        if self._spans is not None:
            self._spans += _spans_of(op)
        self._in_flight = [pending for pending in self._in_flight if not pending.is_finished()]
        self._raise_unless_done(outcome)

    def _raise_unless_done(self, outcome: Any) -> None:
        if outcome.kind.name != "DONE":
            raise error_of(outcome, self._rank)


def _spans_of(op: Any) -> list[Span]:
    """Of a finished operation: all of it, its exchanges, and what passed rows on between nodes."""
    if not op.spans:  # the engine was stopped before it came to it
        return []
    *parts, (name, begin_s, end_s) = op.spans
    lane = lane_of(name)
    if lane is None:
        return []
    spans = [Span(lane, name, begin_s, end_s)]
    spans += [Span(lane, *part) for part in parts if part[0] == "exchange"]
    # A role for each source or thread; the lane shows them as one.
    if forwarding := [part for part in parts if lane_of(part[0]) == "forward"]:
        names, begins, ends = zip(*forwarding, strict=True)
        spans.append(Span("forward", names[0], min(begins), max(ends)))
    return spans


def _native_config(rank: int, config: RuntimeConfig, topology: Topology) -> Any:
    if config.ring_memory == "device":
        raise ConfigError("ring_memory=device: rings of the CPU executor lie in host memory")
    native = _native.EngineConfig()
    native.rank = rank
    native.node_of_rank = list(topology.node_of_rank)
    for name in _COPIED:
        setattr(native, name, getattr(config, name))
    options = transport_options(read_env())
    options.local_rank = topology.local_rank(rank)
    native.transport_options = options
    native.arena_bytes = (
        config.arena_bytes if config.arena_bytes is not None else default_arena_bytes(config, topology, rank)
    )
    native.config_digest = config.digest() ^ hash(topology.node_of_rank) & (2**63 - 1)
    return native


def _build_engine(boot: Bootstrap, config: RuntimeConfig, topology: Topology, timeout_s: float) -> Any:
    native: Any = None
    engine: Any = None

    def configure() -> bytes:
        nonlocal native
        native = _native_config(boot.rank, config, topology)
        return b""

    def build() -> bytes:
        nonlocal engine
        engine = _native.Engine(native)
        address: bytes = engine.address()
        return address

    def connect() -> bytes:
        engine.connect(addresses)
        return b""

    try:
        # What one rank's environment says may not fit; that is for all to know.
        allgather_or_raise(boot, configure, timeout_s=timeout_s)
        addresses = allgather_or_raise(boot, build, timeout_s=timeout_s)
        # Nobody may go on (or away) before the slowest has mapped everybody's memory.
        allgather_or_raise(boot, connect, timeout_s=timeout_s)
    except BaseException:
        if engine is not None:
            engine.abandon()
        raise
    return engine
