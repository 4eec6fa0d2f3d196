"""Units of native/cuda on a device, and launches beside whatever else is current."""

from __future__ import annotations

import ctypes

import torch

from commlib.cuda.compile import compile_unit, default_cache
from commlib.cuda.driver import Kernel, KernelArguments, bind_context, fill_zero, load_kernels

__all__ = ["launch_on", "load_on", "load_units", "zero_on"]

Units = dict[str, dict[str, int]]  # kernels of each unit, and the most dynamic shared memory of their launches


def load_units(units: Units) -> dict[str, Kernel]:
    """Kernels by name, compiled if need be and loaded into the current context."""
    kernels: dict[str, Kernel] = {}
    for unit, names in units.items():
        kernels |= load_kernels(compile_unit(unit, default_cache())[0], names)
    return kernels


def load_on(device_index: int, units: Units) -> dict[str, Kernel]:
    """`load_units` on a device that may not have been used yet."""
    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # makes the context
        bind_context(device_index)
        return load_units(units)


def launch_on(
    device_index: int, kernel: Kernel, blocks: int, threads: int, shared_bytes: int, call: ctypes.Structure
) -> None:
    """Enqueues a kernel on the device's current stream, on whatever thread and device the caller is."""
    if torch._C._cuda_getDevice() != device_index:
        with torch.cuda.device(device_index):
            launch_on(device_index, kernel, blocks, threads, shared_bytes, call)
        return
    bind_context(device_index)
    kernel.launch(
        torch._C._cuda_getCurrentRawStream(device_index), blocks, threads, shared_bytes, KernelArguments(call)
    )


def zero_on(device_index: int, words: torch.Tensor) -> None:
    """Zeros in a contiguous tensor of 32-bit elements, like `launch_on`; a third of what `zero_` costs the host."""
    if torch._C._cuda_getDevice() != device_index:
        with torch.cuda.device(device_index):
            zero_on(device_index, words)
        return
    bind_context(device_index)
    fill_zero(words.data_ptr(), words.numel(), torch._C._cuda_getCurrentRawStream(device_index))
