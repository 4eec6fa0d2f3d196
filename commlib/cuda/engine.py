"""Dispatch and combine on the GPUs of one node.

An operation is one kernel: its head settles on every rank where everything goes, its body moves the rows. The host only
waits if the caller wants to know sizes.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from commlib.cuda.combining import CombineOps
from commlib.cuda.dispatching import DispatchOps
from commlib.cuda.driver import bind_context
from commlib.cuda.latency import LatencyHandle, LatencyOps, PendingLatency
from commlib.cuda.operations import PendingOp
from commlib.cuda.queue import OpQueue
from commlib.cuda.stream_clock import StreamClock, spans_of_marks
from commlib.errors import ConfigError
from commlib.executor import CombineCall, DispatchCall
from commlib.handle import Combined, Dispatched, Handle
from commlib.trace import Span

__all__ = ["CudaEngine", "check_device"]

_T = TypeVar("_T")


def _on_device(method: Callable[..., _T]) -> Callable[..., _T]:
    """The engine's device is the current one inside, on whatever thread and device the caller is."""

    @functools.wraps(method)
    def call(self: CudaEngine, argument: Any) -> _T:
        if torch._C._cuda_getDevice() != self.device.index:
            with torch.cuda.device(self.device):
                return call(self, argument)
        bind_context(self.device.index)
        return method(self, argument)

    return call


class CudaEngine(OpQueue):
    """`Executor` of CUDA tensors, among ranks that share memory over NVLink or a GPU.

    Construction is collective, and so is every operation; all ranks issue them in the same order. Not thread-safe.

    Args:
        device: torch device of this rank.
        boot: the ranks of one node.
        config: shape and limits.
        topology: one node.
        runtime_id: of the Runtime, in its handles.
        connect_timeout_s: seconds within which all ranks must have come.
        tuning: shapes of the kernels; no influence on results.

    Raises:
        ConfigError: sizes that do not fit together.
        CapacityError: the device has too little memory.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._dispatches, self._combines = DispatchOps(self), CombineOps(self)
        # Between nodes the regime is the ordinary kernels, with sizes that nobody waits for.
        self._latency = LatencyOps(self) if self.tiers is None else None

    @_on_device
    def dispatch(self, call: DispatchCall) -> Dispatched:
        if call.regime == "latency" and self._latency is not None:
            return self._latency.dispatch(call)
        return self._take_dispatch(self._dispatches.issue(call, is_split=False))

    @_on_device
    def dispatch_send(self, call: DispatchCall) -> PendingOp | PendingLatency:
        if call.regime == "latency" and self._latency is not None:
            return self._latency.dispatch_send(call)
        return self._dispatches.issue(call, is_split=True)

    @_on_device
    def dispatch_recv(self, pending: Any) -> Dispatched:
        if isinstance(pending, PendingLatency) and self._latency is not None:
            result: Dispatched = self._latency.receive(pending, "latency dispatch")
            return result
        return self._take_dispatch(pending)

    def _take_dispatch(self, pending: Any) -> Dispatched:
        self.finish(pending, ("dispatch", "cached_dispatch"))
        return self._dispatches.result(pending)

    @_on_device
    def combine(self, call: CombineCall) -> Combined:
        if self._latency is not None and _is_latency_handle(call.handle):
            return self._latency.combine(call)
        return self.combine_recv(self._combines.issue(call, is_split=False))

    @_on_device
    def combine_send(self, call: CombineCall) -> PendingOp | PendingLatency:
        if self._latency is not None and _is_latency_handle(call.handle):
            return self._latency.combine_send(call)
        return self._combines.issue(call, is_split=True)

    @_on_device
    def combine_recv(self, pending: Any) -> Combined:
        if isinstance(pending, PendingLatency) and self._latency is not None:
            result: Combined = self._latency.receive(pending, "latency combine")
            return result
        self.finish(pending, ("combine",))
        return Combined(pending.out, pending.out_weight_grads)

    @_on_device
    def refuse(self, reason: str) -> None:
        self.prepare()
        # Of whatever kind: ranks compare their calls only if nobody refuses.
        self.finish(self.reject("barrier", ConfigError(reason), is_split=False), ("barrier",))

    def counters(self) -> dict[str, Any]:
        """The kernels do not count; between nodes the proxy does."""
        return {} if self.tiers is None else self.tiers.counters()

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device)
        local = f", {self.num_local_sms} for local work" if self.num_local_sms != self.num_sms else ""
        between = "" if self.tiers is None else f"; {self.tiers.describe()}"
        return f"CUDA kernels on {self.device} ({name}), {self.num_sms} SMs{local}; peers by CUDA IPC{between}"

    def start_trace(self) -> StreamClock:
        self._clock = StreamClock(self.device)
        self.marks = []
        return self._clock

    def take_trace(self) -> list[Span]:
        marks, self.marks = self.marks or [], None
        torch.cuda.synchronize(self.device)
        return spans_of_marks(marks, self._clock)

    def overflowed(self) -> Any:
        """int32 [1] on the device, not 0 once a dispatch has overflowed its capacity."""
        return self.buffers.overflowed()


def check_device(device: Any) -> None:
    """Before ranks open anything together.

    Raises:
        ConfigError: there is no such device here, or what launches kernels is not installed.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (torch.device(str(device)).index or 0) >= count:
        raise ConfigError(f"device={str(device)!r} is not there: torch {torch.__version__} finds {count} CUDA devices")
    if importlib.util.find_spec("cupy") is None:
        raise ConfigError("CUDA devices need CuPy: pip install cupy-cuda13x")


def device_name(device: Any) -> str:
    """Of the kind of GPU, "NVIDIA H100 80GB HBM3"."""
    return str(torch.cuda.get_device_name(torch.device(str(device))))


def _is_latency_handle(handle: Any) -> bool:
    return isinstance(handle, Handle) and isinstance(handle._native, LatencyHandle)
