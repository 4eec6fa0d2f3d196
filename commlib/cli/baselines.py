"""What `commlib bench` measures against: the same work by MPI Alltoallv and numpy, a memcpy, a plain put."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["AlltoallvExchange", "RoutedRows", "memcpy_seconds"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class RoutedRows(NamedTuple):
    """Rows grouped by local expert, (source rank, token) ascending inside, and the way back."""

    rows: Floats  # [num_rows, hidden]
    order: Ints  # own (token, slot) pairs in the order they were sent
    send_counts: Ints  # [num_ranks]
    recv_counts: Ints  # [num_ranks]
    to_grouped: Ints  # received row -> grouped row


class AlltoallvExchange:
    """Grouped FP32 rows out, weighted sums back: Alltoallv of every (token, slot) row, sorted and unsorted by numpy.

    The straightforward way to do it with MPI. One thread per rank, like one executor thread.
    """

    def __init__(self, comm: Any, num_experts: int) -> None:
        self.comm = comm
        self.num_experts = num_experts
        self.num_local_experts = num_experts // comm.size

    def dispatch(self, x: Floats, topk_idx: Ints) -> RoutedRows:
        comm, hidden = self.comm, x.shape[1]
        flat = topk_idx.ravel()
        order = np.argsort(flat, kind="stable")
        send_counts_e = np.bincount(flat, minlength=self.num_experts)
        recv_counts_e = np.empty((comm.size, self.num_local_experts), dtype=np.int64)
        comm.Alltoall(np.ascontiguousarray(send_counts_e.reshape(comm.size, -1)), recv_counts_e)
        send_counts = send_counts_e.reshape(comm.size, -1).sum(axis=1)
        recv_counts = recv_counts_e.sum(axis=1)
        sent = x[order // topk_idx.shape[1]]
        received = np.empty((int(recv_counts.sum()), hidden), dtype=np.float32)
        self._exchange(sent, send_counts, received, recv_counts)
        experts = np.concatenate([np.repeat(np.arange(self.num_local_experts), counts) for counts in recv_counts_e])
        to_grouped = np.argsort(experts, kind="stable")
        return RoutedRows(received[to_grouped], order, send_counts, recv_counts, to_grouped)

    def combine(self, y: Floats, routed: RoutedRows, topk_weights: Floats) -> Floats:
        num_tokens, num_topk = topk_weights.shape
        back = np.empty_like(y)
        back[routed.to_grouped] = y
        received = np.empty((num_tokens * num_topk, y.shape[1]), dtype=np.float32)
        self._exchange(back, routed.recv_counts, received, routed.send_counts)
        slots = np.empty_like(received)
        slots[routed.order] = received
        out: Floats = np.einsum("tkh,tk->th", slots.reshape(num_tokens, num_topk, -1), topk_weights)
        return out

    def _exchange(self, send: Floats, send_counts: Ints, recv: Floats, recv_counts: Ints) -> None:
        from mpi4py import MPI

        row = MPI.FLOAT.Create_contiguous(send.shape[1]).Commit()
        try:
            self.comm.Alltoallv([send, send_counts, row], [recv, recv_counts, row])
        finally:
            row.Free()


def memcpy_seconds(num_bytes: int, row_bytes: int) -> float:
    """Seconds for one thread to copy `num_bytes` in rows of `row_bytes` between two buffers larger than the caches."""
    num_rows = max(1, min(num_bytes, 256 << 20) // row_bytes)
    source = np.ones((num_rows, row_bytes), dtype=np.uint8)
    target = np.zeros_like(source)
    done = 0
    begin = time.perf_counter()
    while done < num_bytes:
        part = min(num_rows, -(-(num_bytes - done) // row_bytes))
        target[:part] = source[:part]
        done += part * row_bytes
    return time.perf_counter() - begin
