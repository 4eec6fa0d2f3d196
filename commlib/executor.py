"""What an executor is: the part of a Runtime that moves the bytes, on CPU threads or on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from commlib.handle import Combined, Dispatched, Handle
from commlib.layout import Layout
from commlib.memory import MemoryReport

if TYPE_CHECKING:
    from commlib.trace import Clock, Span

__all__ = ["CombineCall", "DispatchCall", "Executor"]


class DispatchCall(NamedTuple):
    """The arguments of `Runtime.dispatch`, as the caller gave them."""

    x: Any
    topk_idx: Any = None
    topk_weights: Any = None
    scales: Any = None
    handle: Handle | None = None
    layout: Layout | str = Layout.GROUPED
    expert_alignment: int | None = None
    fp8: str | None = None
    capacity: int | None = None
    regime: str = "throughput"


class CombineCall(NamedTuple):
    """The arguments of `Runtime.combine`, as the caller gave them."""

    y: Any
    handle: Handle
    weights: Any = None
    weight_grads: Any = None


class Executor(Protocol):
    """Carries out the operations of one Runtime in the order in which they are issued.

    Checks of arguments belong to the executor: a rank that finds its own input bad still takes part in the operation
    and tells the others why.
    """

    def dispatch_send(self, call: DispatchCall) -> Any:
        """Starts a dispatch; returns what `dispatch_recv` takes."""

    def dispatch_recv(self, pending: Any) -> Dispatched:
        """Finishes a dispatch."""

    def dispatch(self, call: DispatchCall) -> Dispatched:
        """Both halves at once."""

    def combine_send(self, call: CombineCall) -> Any:
        """Starts a combine; returns what `combine_recv` takes."""

    def combine_recv(self, pending: Any) -> Combined:
        """Finishes a combine."""

    def combine(self, call: CombineCall) -> Combined:
        """Both halves at once."""

    def refuse(self, reason: str) -> None:
        """Takes part in the operation that the other ranks issue by telling them why this one cannot: all raise it."""

    def barrier(self) -> None:
        """Returns when all ranks have called it."""

    def check(self) -> None:
        """Raises what has gone wrong since the last call and was not raised yet."""

    def record_stream(self, tensor: Any, stream: Any) -> None:
        """See `Runtime.record_stream`."""

    def overflowed(self) -> Any:
        """See `Runtime.overflowed`."""

    def counters(self) -> dict[str, Any]:
        """What this rank has moved since construction; see `Runtime.counters`."""

    def memory(self) -> MemoryReport:
        """Bytes that this rank holds now."""

    def start_trace(self) -> Clock:
        """Notes the times of operations from now on; the clock is theirs."""

    def take_trace(self) -> list[Span]:
        """What `start_trace` has noted, of finished operations; ends it."""

    def describe(self) -> str:
        """What carries the bytes, for logs."""

    def close(self) -> None:
        """Barrier, then frees everything; after a fault it waits for nobody. Called once."""

    def abandon(self) -> None:
        """Leaves without waiting and tells the others; used instead of `close`."""
