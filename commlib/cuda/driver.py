"""Modules and launches through the CUDA driver: one plain struct after another as parameters, nothing converted."""

from __future__ import annotations

import ctypes
from functools import cache

from commlib.errors import TransportError

__all__ = ["Kernel", "load_kernels"]

_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


@cache
def _library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransportError(f"the CUDA driver is not there: {error}", call="dlopen", code=0) from error


def _check(call: str, code: int) -> None:
    if code == 0:
        return
    text = ctypes.c_char_p()
    _library().cuGetErrorString(code, ctypes.byref(text))
    raise TransportError(f"{call} failed: {(text.value or b'unknown error').decode()}", call=call, code=code)


class Kernel:
    """One kernel of a loaded module."""

    def __init__(self, module: ctypes.c_void_p, name: str, max_shared_bytes: int) -> None:
        self.name = name
        self._module = module  # is never unloaded: kernels may still run when the Runtime is gone
        self._function = ctypes.c_void_p()
        library = _library()
        _check("cuModuleGetFunction", library.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()))
        _check(
            "cuFuncSetAttribute",
            library.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED_BYTES, max_shared_bytes),
        )
        # Now, not at the first launch: loading waits for running kernels, which may wait for this one on a peer.
        _check("cuFuncLoad", library.cuFuncLoad(self._function))

    def launch(self, stream: int, blocks: int, threads: int, shared_bytes: int, *structs: ctypes.Structure) -> None:
        """Enqueues the kernel; returns at once."""
        params = (ctypes.c_void_p * len(structs))(*(ctypes.addressof(struct) for struct in structs))
        code = _library().cuLaunchKernel(
            self._function, blocks, 1, 1, threads, 1, 1, shared_bytes, ctypes.c_void_p(stream), params, None
        )
        _check(f"cuLaunchKernel({self.name})", code)


def load_kernels(cubin: bytes, names: dict[str, int]) -> dict[str, Kernel]:
    """Loads machine code into the current context.

    Args:
        cubin: the module.
        names: kernels and the most dynamic shared memory that a launch of each will ask for.
    """
    module = ctypes.c_void_p()
    _check("cuModuleLoadData", _library().cuModuleLoadData(ctypes.byref(module), cubin))
    return {name: Kernel(module, name, shared_bytes) for name, shared_bytes in names.items()}
