"""The Runtime: dispatch and combine for one expert-parallel group."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from commlib import bootstrap as _bootstrap
from commlib.bootstrap.agreement import allgather_or_raise, require_equal
from commlib.config import RuntimeConfig
from commlib.env import Env, read_env
from commlib.errors import ConfigError
from commlib.executor import CombineCall, DispatchCall, Executor
from commlib.handle import Combined, Dispatched, Handle
from commlib.layout import Layout
from commlib.memory import MemoryReport
from commlib.topology import Topology, node_key
from commlib.tuned_plans import (
    TUNED_FIELDS,
    Plans,
    apply_plan,
    default_file,
    read_plans,
    shape_key,
    topology_key,
    with_built_in_plan,
)

if TYPE_CHECKING:
    from commlib.trace import Recorder, Span

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
        config: shape and limits; environment variables override timeouts, threads, transport, chunks, rings and blocks.
        device: where rows live and who moves them: None or "cpu" (numpy arrays and CPU tensors, moved by threads), or
            a CUDA device (CUDA tensors, moved by kernels), the same kind on all ranks. Ranks may share a GPU.
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
        device: Any = None,
        topology: Topology | None = None,
        connect_timeout_s: float = 60.0,
    ) -> None:
        if config is None:
            raise ConfigError("Runtime needs a RuntimeConfig with at least hidden, num_experts and num_topk")
        make_executor = _executor_of(device)
        env = read_env()
        self.config = config.with_env(env)
        self._id = next(_ids)
        boot = _bootstrap.connect(group, env=env, timeout_s=connect_timeout_s)
        try:
            self.rank: int = boot.rank
            self.num_ranks: int = boot.size
            self.topology, plans = _agree_on_topology(boot, self.config, topology, env, connect_timeout_s, device)
            if self.config.transport == "auto" and self.topology.num_nodes > 1:
                from commlib.transport import agree_on_transport  # here: it needs the native core

                local_rank = self.topology.local_rank(self.rank)
                transport = agree_on_transport(boot, local_rank, connect_timeout_s)
                self.config = dataclasses.replace(self.config, transport=transport)
            plan = plans.of_topology(topology_key(self.topology, self.config.transport))
            self._plan_text = ""
            if plan is None:
                self.config = with_built_in_plan(self.config, _kind_of(device), self.topology, env)
            else:
                self.config = apply_plan(self.config, plan, env)
                in_use = {name: value for name, value in plan.items() if getattr(self.config, name) == value}
                if in_use:
                    self._plan_text = f"\ntuned plan, from rank 0's file: {json.dumps(in_use)}"
            self._executor: Executor = make_executor(boot, self.config, self.topology, self._id, connect_timeout_s)
            self._bootstrap_text = boot.describe()
        finally:
            if boot is not group:
                boot.close()
        self.trace: Recorder | None = None  # between start_trace and take_trace
        self._is_closed = False
        # A Runtime that is dropped, or a process that ends, must not leave peers waiting for it.
        self._finalizer = weakref.finalize(self, _abandon, self._executor)
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
        capacity: int | None = None,
        regime: str = "throughput",
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
            capacity: GPU only: rows of the result, equal on all ranks. The host then never waits for sizes, so that
                the call may be captured in a CUDA graph. Rows and counts that matter are on the device; if a rank needs
                more rows, nothing moves, all counts are 0, combine gives NaN and `overflowed` says so. A replay is one
                more operation in the order of all: on the stream of the eager calls, not between halves. The heap
                does not grow for it: rows that do not fit in `RuntimeConfig.arena_bytes` are refused at once, a combine
                that does not gives NaN and is refused by `check`.
            regime: "throughput", or, for at most `decode_tokens` tokens per rank on GPUs, "latency": within a node one
                hop without an exchange before it; BF16 rows or `fp8`, layout "grouped", `capacity` as above (None:
                enough for every choice). Within a node at most two such dispatches may be without their second half.

        Returns:
            Dispatched, in the order of docs/design.md section 3.

        Raises:
            ConfigError: a rank's input is bad or ranks disagree; on every rank, in this call; the Runtime stays usable.
            CapacityError: a rank has no room for its rows; on every rank; the Runtime stays usable.
            CommTimeout, PeerLostError, TransportError: the Runtime is of no further use; close it and build another.
        """
        self._check_open()
        return self._executor.dispatch(
            DispatchCall(
                x=x,
                topk_idx=topk_idx,
                topk_weights=topk_weights,
                scales=scales,
                handle=handle,
                layout=layout,
                expert_alignment=expert_alignment,
                fp8=fp8,
                capacity=capacity,
                regime=regime,
            )
        )

    def dispatch_send(self, x: Any, topk_idx: Any = None, topk_weights: Any = None, **options: Any) -> Any:
        """First half of `dispatch`, with its arguments: starts it and returns at once (once there is room for it, see
        `max_in_flight`). The arrays must not change until `dispatch_recv`.

        On a GPU it runs on a stream of the Runtime's own, behind what the current stream has been given, so that
        compute enqueued between the halves runs beside it.
        """
        self._check_open()
        return self._executor.dispatch_send(DispatchCall(x=x, topk_idx=topk_idx, topk_weights=topk_weights, **options))

    def dispatch_recv(self, pending: Any) -> Dispatched:
        """Second half of `dispatch`: waits for it (on a GPU the current stream does)."""
        return self._executor.dispatch_recv(pending)

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
            Combined, in the dtype of `y`. NaN everywhere if the dispatch overflowed its `capacity`.

        Raises:
            Like `dispatch`.
        """
        self._check_open()
        return self._executor.combine(CombineCall(y=y, handle=handle, weights=weights, weight_grads=weight_grads))

    def combine_send(self, y: Any, handle: Handle, *, weights: Any = None, weight_grads: Any = None) -> Any:
        """First half of `combine`; see `dispatch_send`."""
        self._check_open()
        return self._executor.combine_send(CombineCall(y=y, handle=handle, weights=weights, weight_grads=weight_grads))

    def combine_recv(self, pending: Any) -> Combined:
        """Second half of `combine`: waits for it (on a GPU the current stream does)."""
        return self._executor.combine_recv(pending)

    # ---- the rest

    def refuse(self, reason: str) -> NoReturn:
        """For callers with rules of their own: takes part in the operation that the other ranks issue by telling them
        why this one cannot. To raise on one rank alone would leave the others waiting.

        Raises:
            ConfigError: with the reason, on every rank, in this operation; the Runtime stays usable.
            CommTimeout, PeerLostError, TransportError: see `dispatch`.
        """
        self._check_open()
        self._executor.refuse(reason)
        raise ConfigError(reason)

    def barrier(self) -> None:
        """Returns when all ranks have called it. An operation like the others."""
        self._check_open()
        self._executor.barrier()

    def check(self) -> None:
        """Raises what went wrong since the last call, without waiting: a lost peer is noticed also between calls. Only
        this and `close` raise the refusal of a call with `capacity`: nobody waits for its verdict.

        Raises:
            ConfigError: an operation was refused, see `dispatch`.
            CommTimeout, PeerLostError, TransportError: see `dispatch`.
        """
        self._executor.check()

    def record_stream(self, tensor: Any, stream: Any) -> None:
        """A result (any tensor of it) is used on `stream`, a CUDA stream other than that of later calls: its memory is
        given to a later operation only when what the stream has been given until the result is dropped is done.
        """
        self._executor.record_stream(tensor, stream)

    def overflowed(self) -> Any:
        """int32 [1] on the device, not 0 once some dispatch has needed more than its `capacity` on any rank; set it to
        0 to start anew. On CPUs False.
        """
        return self._executor.overflowed()

    def counters(self) -> dict[str, Any]:
        """What this rank has moved since construction.

        Keys: ``payload_bytes`` (row and scale bytes posted to the transport), ``data_bytes`` (with records and
        gradients), ``exchange_bytes``, ``commands``, ``signals``, and ``roles``: per role ``rows``, ``bytes_read`` and
        ``bytes_written``. On GPUs nothing on one node, between nodes the four that are not of rows and roles.
        """
        return self._executor.counters()

    def memory(self) -> MemoryReport:
        """Bytes that this rank holds now."""
        return self._executor.memory()

    def start_trace(self) -> Recorder:
        """Notes from now on when operations begin and end; what the caller does is noted by what this returns. Not
        between the halves of an operation. See `commlib.trace`.
        """
        from commlib.trace import TracedExecutor

        self._check_open()
        if self.trace is not None:
            raise ConfigError("a trace is being taken: take_trace() first")
        traced = TracedExecutor(self._executor)
        self._executor = cast(Executor, traced)
        self.trace = traced.recorder
        return self.trace

    def take_trace(self) -> list[Span]:
        """Ends the trace: all spans of this rank, in seconds of its own clock (on CPUs `time.monotonic`, which GPUs'
        follows). Operations that were not waited for are left out. On a GPU it waits for the device.
        """
        traced, recorder = cast(Any, self._executor), self.trace
        if recorder is None:
            raise ConfigError("no trace is being taken: start_trace() first")
        self._executor, self.trace = traced.inner, None
        return [*self._executor.take_trace(), *recorder.spans()]

    def describe(self) -> str:
        """Several lines for logs: who we are, how ranks met, what carries the bytes."""
        return (
            f"commlib rank {self.rank} of {self.num_ranks} on {self.topology.num_nodes} nodes, "
            f"{self._bootstrap_text}\n{self._executor.describe()}\nmemory: {self.memory()}{self._plan_text}"
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
        self._executor.close()

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


def _abandon(executor: Executor) -> None:
    executor.abandon()


def _kind_of(device: Any) -> str:
    return "cpu" if device is None else str(device).partition(":")[0]


def _name_of(device: Any) -> str:
    """What a plan is tuned for: GPUs of one kind are alike."""
    if _kind_of(device) == "cpu":
        return "cpu"
    from commlib.cuda.engine import device_name

    return device_name(device)


def _executor_of(device: Any) -> Callable[..., Executor]:
    """What makes the executor for a device. Its module is loaded before the bootstrap loads an MPI, which may bring an
    older UCX of its own, and only it: GPUs need no native core, CPUs no torch."""
    if _kind_of(device) == "cpu":
        from commlib.cpu_executor import CpuExecutor

        return CpuExecutor
    if _kind_of(device) == "cuda":
        from commlib.cuda.engine import CudaEngine

        return partial(CudaEngine, device)
    raise ConfigError(f'device={device!r} is neither None, "cpu" nor a CUDA device')


def _agree_on_topology(
    boot: _bootstrap.Bootstrap,
    config: RuntimeConfig,
    topology: Topology | None,
    env: Env,
    timeout_s: float,
    device: Any,
) -> tuple[Topology, Plans]:
    """The topology, and the tuned plans that rank 0 knows for the shape.

    Raises:
        ConfigError: on all ranks alike, a rank's numbers do not fit or ranks were told different things.
    """

    def tell() -> bytes:
        given = topology
        if given is None and env.ranks_per_node is not None:
            given = Topology.uniform(boot.size, env.ranks_per_node)
        if given is not None and given.num_ranks != boot.size:
            raise ConfigError(f"topology has {given.num_ranks} ranks, the group has {boot.size}")
        config.check_ranks(boot.size)
        if _kind_of(device) == "cuda":
            from commlib.cuda.engine import check_device

            check_device(device)
        nodes = "found out" if given is None else list(given.node_of_rank)
        plans = Plans()
        if boot.rank == 0 and config.use_tuned_plan and env.plans != "off":
            path = default_file() if env.plans is None else Path(env.plans)
            plans = read_plans(path).of_shape(shape_key(config, _name_of(device)))
            if plans.entries:
                _logger.info("%s has tuned plans for this shape", path)
        return json.dumps(
            {
                "must agree": {
                    **config.shared(),
                    "device": _kind_of(device),
                    "topology": nodes,
                    # Equal values do not say where they come from, which decides whether a plan replaces them.
                    "environment": [name for name in TUNED_FIELDS if getattr(env, name) is not None],
                },
                "node": node_key(),
                "plans": plans.to_bytes().decode(),
            }
        ).encode()

    told = [json.loads(blob) for blob in allgather_or_raise(boot, tell, timeout_s=timeout_s)]
    require_equal([each["must agree"] for each in told])
    nodes = told[0]["must agree"]["topology"]
    plans = Plans.from_bytes(told[0]["plans"].encode())
    keys = [each["node"] for each in told]
    if nodes == "found out":
        return Topology.from_node_keys(keys), plans
    given = Topology(tuple(nodes))
    for ranks in map(given.ranks_of_node, range(given.num_nodes)):
        for rank in ranks:
            if keys[rank] != keys[ranks[0]]:
                raise ConfigError(
                    f"ranks {ranks[0]} and {rank} are declared to share node {given.node(rank)}, but cannot share "
                    f"memory: {keys[ranks[0]]} and {keys[rank]}"
                )
    return given, plans
