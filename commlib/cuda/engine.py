"""Dispatch and combine on the GPUs of one node.

An operation is one kernel: its head settles on every rank where everything goes, its body moves the rows. The host only
waits if the caller wants to know sizes.
"""

from __future__ import annotations

from typing import Any

import torch

from commlib.cuda.calls import check_handle
from commlib.cuda.combining import CombineOps
from commlib.cuda.dispatching import DispatchOps
from commlib.cuda.latency import LatencyHandle, LatencyOps, PendingLatency
from commlib.cuda.operations import PendingOp
from commlib.cuda.queue import OpQueue
from commlib.errors import ConfigError
from commlib.executor import CombineCall, DispatchCall
from commlib.handle import Combined, Dispatched, Handle

__all__ = ["CudaEngine"]


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
        self._dispatches, self._combines, self._latency = DispatchOps(self), CombineOps(self), LatencyOps(self)

    def dispatch(self, call: DispatchCall) -> Dispatched:
        if _is_latency(call):
            return self._latency.dispatch(call)
        return self.dispatch_recv(self._dispatches.issue(call, is_split=False))

    def dispatch_send(self, call: DispatchCall) -> PendingOp | PendingLatency:
        if _is_latency(call):
            return self._latency.dispatch_send(call)
        return self._dispatches.issue(call, is_split=True)

    def dispatch_recv(self, pending: Any) -> Dispatched:
        if isinstance(pending, PendingLatency):
            result: Dispatched = self._latency.receive(pending, "latency dispatch")
            return result
        self.finish(pending, ("dispatch", "cached_dispatch"))
        return self._dispatches.result(pending)

    def combine(self, call: CombineCall) -> Combined:
        if self._is_latency_handle(call.handle):
            return self._latency.combine(call)
        return self.combine_recv(self._combines.issue(call, is_split=False))

    def combine_send(self, call: CombineCall) -> PendingOp | PendingLatency:
        if self._is_latency_handle(call.handle):
            return self._latency.combine_send(call)
        return self._combines.issue(call, is_split=True)

    def combine_recv(self, pending: Any) -> Combined:
        if isinstance(pending, PendingLatency):
            result: Combined = self._latency.receive(pending, "latency combine")
            return result
        self.finish(pending, ("combine",))
        return Combined(pending.out, pending.out_weight_grads)

    def counters(self) -> dict[str, Any]:
        """The kernels do not count."""
        return {}

    def describe(self) -> str:
        name = torch.cuda.get_device_name(self.device)
        local = f", {self.num_local_sms} for local work" if self.num_local_sms != self.num_sms else ""
        return f"CUDA kernels on {self.device} ({name}), {self.num_sms} SMs{local}; peers by CUDA IPC"

    def overflowed(self) -> Any:
        """int32 [1] on the device, not 0 once a dispatch has overflowed its capacity."""
        return self.buffers.overflowed()

    def _is_latency_handle(self, handle: Any) -> bool:
        return isinstance(handle, Handle) and isinstance(check_handle(handle, self.runtime_id), LatencyHandle)


def _is_latency(call: DispatchCall) -> bool:
    if call.regime not in ("throughput", "latency"):
        raise ConfigError(f'regime={call.regime!r} is not "throughput" or "latency"')
    return call.regime == "latency"
