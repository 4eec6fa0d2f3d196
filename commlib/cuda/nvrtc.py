"""NVRTC, the run-time compiler, through its C interface: it needs neither a GPU nor a driver."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from commlib.errors import ConfigError

__all__ = ["compile_cubin", "version"]


@cache
def _library() -> ctypes.CDLL:
    """The library of the nvidia-cuda-nvrtc wheel, else the one of the system."""
    names = []
    for package in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for place in (spec.submodule_search_locations or []) if spec is not None else []:
            names += sorted(str(path) for path in Path(place).glob("lib/libnvrtc.so.1*"))
    for name in [*names, "libnvrtc.so.13", "libnvrtc.so"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ConfigError("libnvrtc is not there: pip install nvidia-cuda-nvrtc, or put CUDA 13 on the library path")


def version() -> str:
    """As "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_cubin(source: str, name: str, options: Sequence[str]) -> tuple[bytes, str]:
    """Compiles CUDA C++ to machine code.

    Returns:
        (cubin, the compiler's messages).

    Raises:
        ConfigError: the source does not compile; the message holds the compiler's.
    """
    library = _library()
    program = ctypes.c_void_p()
    if library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None) != 0:
        raise ConfigError(f"nvrtcCreateProgram failed for {name}")
    try:
        encoded = [option.encode() for option in options]
        status = library.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded))
        log = _read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if status != 0:
            raise ConfigError(f"{name} does not compile with {' '.join(options)}:\n{log}")
        return _read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(get_size: Callable[..., int], get: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    if get_size(program, ctypes.byref(size)) != 0:
        raise ConfigError("NVRTC does not tell the size of its output")
    buffer = ctypes.create_string_buffer(size.value)
    if get(program, buffer) != 0:
        raise ConfigError("NVRTC does not give its output")
    return buffer.raw
