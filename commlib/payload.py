"""Arrays of the caller as the native core sees them: address, dtype, shape; numpy and torch alike.

torch is looked up, never imported: a process that hands in numpy arrays runs without it. BF16 and FP8 arrays of numpy
are those of ``ml_dtypes``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from commlib.errors import ConfigError

__all__ = ["Framework", "Rows", "framework_of", "optional_array", "require_memory", "require_rows"]

# Names are those of torch and ml_dtypes; codes those of `Dtype` in native/common/types.hpp.
DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float8_e4m3fn": 2}
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}


class Rows(NamedTuple):
    """A contiguous array and what keeps its memory alive."""

    address: int
    dtype: str
    shape: tuple[int, ...]
    owner: Any


@dataclass(frozen=True)
class Framework:
    """Where the caller's arrays come from, and therefore the results: "numpy" or "torch"."""

    name: str

    def view(self, data: Any, dtype: str, shape: tuple[int, ...]) -> Any:
        """uint8 numpy memory (which keeps its slab alive) as an array of `dtype` and `shape`; no copy."""
        if self.name == "torch":
            torch = sys.modules["torch"]
            return torch.from_numpy(data).view(getattr(torch, dtype)).view(shape)
        return data.view(_numpy_dtype(dtype)).reshape(shape)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """New uninitialised memory of the caller's framework."""
        if self.name == "torch":
            torch = sys.modules["torch"]
            return torch.empty(shape, dtype=getattr(torch, dtype))
        return np.empty(shape, dtype=_numpy_dtype(dtype))

    def rows(self, array: Any, name: str) -> Rows:
        """`array` as contiguous CPU memory; a strided array is copied."""
        if self.name == "torch":
            if array.device.type != "cpu":
                raise ConfigError(f"{name} is on device {array.device}; the CPU executor takes CPU tensors")
            tensor = array.detach().contiguous()
            return Rows(tensor.data_ptr(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor)
        contiguous = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
        return Rows(contiguous.ctypes.data, contiguous.dtype.name, tuple(array.shape), contiguous)


def _numpy_dtype(dtype: str) -> Any:
    if dtype in ("bfloat16", "float8_e4m3fn"):
        try:
            import ml_dtypes
        except ImportError:
            raise ConfigError(f"numpy arrays of {dtype} need the package ml_dtypes") from None
        return np.dtype(getattr(ml_dtypes, dtype))
    return np.dtype(dtype)


def require_memory(tensor: Any, name: str) -> None:
    """Raises ConfigError for a torch tensor that is made of others (`quant.Fp8Rows`, a DTensor)."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        raise ConfigError(f"{name} is a {type(tensor).__name__}, which has no memory of its own: give its parts")


def framework_of(array: Any, name: str) -> Framework:
    """The framework of `array`.

    Raises:
        ConfigError: neither a numpy array nor a torch tensor, or a tensor that is made of others.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        require_memory(array, name)
        return Framework("torch")
    if isinstance(array, np.ndarray):
        return Framework("numpy")
    raise ConfigError(f"{name} is a {type(array).__name__}, not a torch tensor or numpy array")


def _check(rows: Rows, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...], meaning: str) -> None:
    if rows.dtype not in dtypes:
        raise ConfigError(f"{name} has dtype {rows.dtype}, not {' or '.join(dtypes)}")
    if len(rows.shape) != len(shape) or any(
        want is not None and have != want for have, want in zip(rows.shape, shape, strict=True)
    ):
        raise ConfigError(f"{name} has shape {list(rows.shape)}, not {meaning}")


def require_rows(
    array: Any, name: str, *, dtypes: tuple[str, ...], shape: tuple[int | None, ...], meaning: str
) -> Rows:
    """`array` checked and made contiguous. None in `shape` stands for any size; `meaning` names it in the error."""
    rows = framework_of(array, name).rows(array, name)
    _check(rows, name, dtypes, shape, meaning)
    return rows


def optional_array(
    array: Any, name: str, *, dtypes: tuple[str, ...], shape: tuple[int | None, ...], meaning: str
) -> Rows:
    """Like `require_rows`; None gives address 0."""
    if array is None:
        return Rows(0, dtypes[0], (), None)
    return require_rows(array, name, dtypes=dtypes, shape=shape, meaning=meaning)
