"""Multiprocessors that are taken, as communication takes them: for a fair step without communication."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["SOURCE", "occupied"]

SOURCE = """
extern "C" __global__ void occupy(volatile int* is_over) {
  extern __shared__ char taken[];
  // Once a millisecond: loads of host memory, by 20 blocks once a microsecond, slow GEMMs beside them 15-fold.
  if (threadIdx.x == 0) while (*is_over == 0) __nanosleep(1000000);
}
"""
_SHARED_BYTES = 200 * 1024  # of a multiprocessor's 227: no other block fits beside it


@contextmanager
def occupied(num_sms: int) -> Iterator[None]:
    """Inside, so many multiprocessors of the current device do nothing and nothing else runs on them. 0: none."""
    if num_sms == 0:
        yield
        return
    import cupy

    kernel: Any = cupy.RawKernel(SOURCE, "occupy")
    kernel.max_dynamic_shared_size_bytes = _SHARED_BYTES
    flag = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    stream = cupy.cuda.Stream(non_blocking=True)
    torch.cuda.synchronize()
    with stream:
        kernel((num_sms,), (32,), (flag.data_ptr(),), shared_mem=_SHARED_BYTES)
    try:
        yield
    finally:
        flag.fill_(1)
        stream.synchronize()
