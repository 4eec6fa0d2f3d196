"""Rows that stay in FP8 and look like the dtype they were cast from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from commlib.errors import ConfigError
from commlib.layout import num_scales
from commlib.quant.e4m3 import dequantize

__all__ = ["Fp8Rows"]

_ALIASING = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_RESHAPING = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default)


class Fp8Rows(Tensor):
    """FP8 E4M3 rows with 1x128 scales as a tensor of another dtype: what dispatch delivers, without a second copy.

    An operation that knows nothing of it gets `dequantize(fp8, scales, dtype)`, anew each time and in memory of its
    own; one that does reads `fp8` and `scales`. It cannot be written to. Autograd sees a tensor of `dtype`, so its
    gradient is one of `dtype`, and what saves it for the backward pass keeps one byte per element.

    Args:
        fp8: float8_e4m3fn [T, H].
        scales: FP32 [T, H / 128].
        dtype: what it stands for: bfloat16 or float32.

    Raises:
        ConfigError: the shapes or dtypes do not fit.
    """

    fp8: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, fp8: Tensor, scales: Tensor, dtype: torch.dtype) -> Fp8Rows:
        if fp8.dtype != torch.float8_e4m3fn or fp8.ndim != 2 or scales.dtype != torch.float32:
            raise ConfigError(
                f"fp8 {fp8.dtype} {list(fp8.shape)} and scales {scales.dtype}, "
                "the rule: float8_e4m3fn [tokens, hidden] and float32"
            )
        if tuple(scales.shape) != (len(fp8), num_scales(fp8.shape[1])):
            raise ConfigError(
                f"scales has shape {list(scales.shape)}, the rule: [{len(fp8)}, {num_scales(fp8.shape[1])}]"
            )
        rows: Fp8Rows = Tensor._make_wrapper_subclass(
            cls, fp8.shape, dtype=dtype, device=fp8.device, strides=fp8.stride()
        )
        rows.fp8, rows.scales = fp8, scales
        return rows

    def dequantize(self) -> Tensor:
        """[T, H] of `dtype`: a plain tensor, outside of autograd's sight."""
        return dequantize(self.fp8, self.scales, self.dtype)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Fp8Rows({list(self.shape)}, {self.dtype}, device={self.device})"

    # ---- what torch asks of a tensor that is made of others

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["fp8", "scales"], self.dtype

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> Fp8Rows:
        return Fp8Rows(parts["fp8"], parts["scales"], dtype)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        rows = args[0]
        if op in _ALIASING or (op in _RESHAPING and _is_whole(rows, args[1])):
            return Fp8Rows(rows.fp8, rows.scales, rows.dtype)
        if any(isinstance(each, Fp8Rows) for each in _written(op, args, kwargs or {})):
            raise ConfigError(f"{op} would write into FP8 rows; dequantize() them first")
        args, kwargs = tree_map_only(Fp8Rows, Fp8Rows.dequantize, (args, kwargs or {}))
        return op(*args, **kwargs)


def _written(op: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """What an operation writes into."""
    if not op._schema.is_mutable:
        return []
    given = dict(zip((each.name for each in op._schema.arguments), args, strict=False)) | kwargs
    return [given.get(each.name) for each in op._schema.arguments if each.alias_info and each.alias_info.is_write]


def _is_whole(rows: Tensor, shape: Any) -> bool:
    return tuple(shape) in (tuple(rows.shape), (-1, rows.shape[1]), (rows.shape[0], -1))
