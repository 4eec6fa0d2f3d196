"""What operations leave behind: handles, results under way, and arena bytes as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from commlib.cuda.memory import Slab
from commlib.cuda.params import HostResult, Tables
from commlib.handle import Handle

__all__ = ["ArenaBytes", "CudaHandle", "PendingOp"]


@dataclass
class CudaHandle:
    """What a dispatch leaves behind on the device and the host; `Handle` shows it to the caller."""

    epoch: int
    layout: str
    alignment: int
    num_tokens: int
    tables: Tables
    memory: tuple[Any, ...]  # what `tables` and `routes` point into
    routes: Any
    num_rows: int = 0
    records: Slab | None = None
    rows_per_expert: tuple[int, ...] = ()
    rank_counts: tuple[tuple[int, ...], ...] = ()
    load: tuple[int, ...] = ()


@dataclass
class PendingOp:
    """An operation under way. Holds the caller's tensors until the current stream waits for it."""

    kind: str
    epoch: int
    done: Any
    inputs: tuple[Any, ...] = ()
    grant: Slab | None = None
    handle: CudaHandle | None = None
    public_handle: Handle | None = None
    dtype: str = ""
    out: Any = None
    out_weight_grads: Any = None
    settled: HostResult | None = None
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
