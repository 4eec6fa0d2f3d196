"""FP8 weights that are cast once per optimizer step, however many micro-batches use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from commlib.errors import ConfigError
from commlib.experts.grouped_gemm import Fp8Weight, quantize_experts

__all__ = ["cast_weight", "is_keeping", "keep_weight_casts"]


class _Kept(NamedTuple):
    weight: Tensor  # itself, so that no other gets its id
    version: int
    cast: Fp8Weight
    stream: Any  # that the cast was made on, and an event after it; None: no CUDA tensor
    made: Any


_kept: dict[tuple[int, bool], _Kept] | None = None  # of all threads: autograd has some of its own


@contextmanager
def keep_weight_casts() -> Iterator[None]:
    """Inside, `fp8_swiglu` casts each weight once as it is and once turned (for the gradient of the input).

    For the forward and backward passes of one optimizer step: leave it before weights change. In-place operations that
    torch counts are noticed, but not fused optimizers, sharded weights that are gathered anew, or `.data`. Holds two
    bytes per weight element, as much as a copy in BF16. CUDA graphs that are captured inside cast for themselves.

    Raises:
        ConfigError: the process is inside already.
    """
    global _kept
    if _kept is not None:
        raise ConfigError("keep_weight_casts is active already: one optimizer step at a time")
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def is_keeping() -> bool:
    """Whether the process is inside `keep_weight_casts`."""
    return _kept is not None


def cast_weight(weight: Tensor, *, turned: bool = False) -> Fp8Weight:
    """FP8 of `weight` [E, N, K], or of `weight.mT` if `turned`; the same tensors again while casts are kept."""
    casts, is_cuda = _kept, weight.is_cuda
    if casts is None or weight.is_inference() or (is_cuda and torch.cuda.is_current_stream_capturing()):
        return quantize_experts(weight.mT if turned else weight)
    stream = torch.cuda.current_stream(weight.device) if is_cuda else None
    kept = casts.get((id(weight), turned))
    if kept is None or kept.version != weight._version:
        cast = quantize_experts(weight.mT if turned else weight)
        kept = _Kept(weight, weight._version, cast, stream, stream.record_event() if stream else None)
        casts[id(weight), turned] = kept
    elif stream is not None and kept.stream != stream:
        stream.wait_event(kept.made)
        for each in kept.cast:
            each.record_stream(stream)
    return kept.cast
