"""What NVLink and the multiprocessors give: a plain bulk push of rows to all other ranks, and nothing else."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from commlib.cuda.driver import KernelArguments
from commlib.cuda.launch import MAX_SHARED_BYTES, push_limit_bytes
from commlib.cuda.params import PushLimitCall
from commlib.cuda.units import load_units

__all__ = ["PushLimit", "Way"]


class Way(NamedTuple):
    """How rows are cut up."""

    name: str
    warps: int
    pieces: int


class PushLimit:
    """Pushes into the heaps of an executor's ranks, whose results are lost.

    Args:
        executor: a CudaEngine; no result of it is in use.
        rows: [num_rows, hidden] BF16.
        num_sms: blocks.
    """

    def __init__(self, executor: Any, rows: Any, num_sms: int) -> None:
        self._executor, self._rows, self._num_sms = executor, rows, num_sms
        self._row_bytes = rows.shape[1] * rows.element_size()
        self._kernel = load_units({"push_limit": {"push_limit": MAX_SHARED_BYTES}})
        self._peers = executor.topology.scale_up_peers(executor.rank)

    @property
    def has_peers(self) -> bool:
        """Whether there is anybody to push to: other ranks of the own node."""
        return bool(self._peers)

    def ways(self) -> list[Way]:
        """The faster one counts."""
        return [Way("7 warps, half rows", 7, 2), Way("14 warps, quarter rows", 14, 4)]

    def pushed_rows(self, num_rows: int) -> int:
        return num_rows // max(1, len(self._peers)) * len(self._peers)

    def prepare(self, num_rows: int, way: Way) -> tuple[KernelArguments, int, int]:
        """As many rows to each peer, `num_rows` in all."""
        executor, per_peer = self._executor, num_rows // max(1, len(self._peers))
        call = PushLimitCall(
            rows=self._rows.data_ptr(),
            num_peers=len(self._peers),
            num_rows=per_peer,
            row_bytes=self._row_bytes,
            piece_bytes=self._row_bytes // way.pieces,
        )
        for place, peer in enumerate(self._peers):
            call.landing[place] = executor.arena.heap_base[peer] + executor.rank * per_peer * self._row_bytes
        return KernelArguments(call), 32 * way.warps, push_limit_bytes(way.warps, call.piece_bytes)

    def push(self, prepared: tuple[KernelArguments, int, int]) -> None:
        """Enqueues it on the current stream."""
        arguments, threads, shared_bytes = prepared
        stream = torch.cuda.current_stream().cuda_stream
        self._kernel["push_limit"].launch(stream, self._num_sms, threads, shared_bytes, arguments)
