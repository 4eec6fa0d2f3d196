"""Who casts: kernels for CUDA tensors, torch for others."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from commlib import quant

__all__ = ["casts_for"]


def casts_for(x: Tensor) -> Any:
    """A module with `cast_rows`, `quantize_weight`, `retile_columns` and the functions of `commlib.quant.swiglu`."""
    if not x.is_cuda:
        return quant
    from commlib.cuda import quant as kernels

    return kernels
