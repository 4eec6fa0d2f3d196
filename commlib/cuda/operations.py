"""What operations leave behind: handles, operations under way, and arena bytes as tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from commlib.cuda.driver import KernelArguments
from commlib.cuda.memory import Slab
from commlib.cuda.params import ExchangeCall, Tables
from commlib.errors import ConfigError
from commlib.handle import Handle

__all__ = ["ArenaBytes", "CudaHandle", "KernelCall", "PendingOp"]


@dataclass(slots=True)
class CudaHandle:
    """What a dispatch leaves behind on the device and the host; `Handle` shows it to the caller.

    With a `capacity` the host never learns the sizes: `num_rows` is the capacity, `rows_per_expert` a tensor.
    """

    layout: str
    alignment: int
    num_tokens: int
    capacity: int
    tables: Tables
    memory: Any  # what `tables` and `routes_address` point into
    routes_address: int
    stream: int  # that `memory` was allocated on
    epoch: int = 0
    num_rows: int = 0
    records: Slab | None = None
    rows_per_expert: Any = ()
    rank_counts: tuple[tuple[int, ...], ...] = ()
    load: tuple[int, ...] = ()
    node_counts: tuple[tuple[int, ...], ...] = ()
    most_tokens: int = 0  # of any rank
    tier_addresses: tuple[int, ...] = ()  # slot_tokens, token_slots, forward_records of TierCall

    @property
    def records_address(self) -> int:
        return 0 if self.records is None else self.records.address

    @property
    def tokens_per_rank(self) -> tuple[tuple[int, ...], ...]:
        """[source][rank] distinct tokens."""
        return self.rank_counts

    @property
    def tokens_per_node(self) -> tuple[tuple[int, ...], ...]:
        """[source][node] distinct tokens."""
        if not self.node_counts:
            raise ConfigError("tokens per node are counted where there are several nodes, and sizes are exact")
        return self.node_counts


class KernelCall:
    """One launch of a kernel that moves rows. The structs are read when it is launched."""

    def __init__(self, name: str, blocks: int, threads: int, shared_bytes: int, *structs: ctypes.Structure) -> None:
        self.name, self.blocks, self.threads, self.shared_bytes = name, blocks, threads, shared_bytes
        self.arguments = KernelArguments(*structs)


@dataclass(slots=True)
class PendingOp:
    """An operation under way. Holds the caller's tensors until the current stream waits for it.

    Attributes:
        exchange: what all ranks must agree on.
        data: the kernel that moves rows, if any.
        template: of a dispatch: what its results look like.
        grant_bytes: room in the own heap that it needs; None = all there is, the size becomes known on the way.
        is_lazy: nobody waits for its verdict; a refusal is raised by a later call.
    """

    kind: str
    runtime_id: int
    exchange: ExchangeCall
    data: KernelCall | None = None
    template: Any = None
    grant_bytes: int | None = 0
    is_lazy: bool = False
    is_split: bool = False
    stream: Any = None
    issue_stream: Any = None
    done: Any = None
    ticket: int = 0
    inputs: tuple[Any, ...] = ()
    grant: Slab | None = None
    handle: CudaHandle | None = None
    public_handle: Handle | None = None
    out: Any = None
    out_weight_grads: Any = None
    settled: bool = False
    error: Exception | None = None


class ArenaBytes:
    """Bytes of the arena for torch: keeps the slab alive as long as a tensor refers to them."""

    def __init__(self, address: int, num_bytes: int, slab: Slab) -> None:
        self._slab = slab
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
            "strides": None,
        }
