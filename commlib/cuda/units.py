"""Units of native/cuda on a device, and launches beside whatever else is current."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from commlib.cuda.compile import compile_unit, default_cache
from commlib.cuda.driver import Kernel, KernelArguments, bind_context, fill_zero, load_kernels

__all__ = ["current_stream", "launch_on", "load_on", "load_units", "zero_on"]

Units = dict[str, dict[str, int]]  # kernels of each unit, and the most dynamic shared memory of their launches


def load_units(units: Units) -> dict[str, Kernel]:
    """Kernels by name, compiled if need be (all units at once: the largest takes a quarter of a minute) and loaded into
    the current context."""
    with ThreadPoolExecutor() as pool:
        cubins = list(pool.map(lambda unit: compile_unit(unit, default_cache())[0], units))
    kernels: dict[str, Kernel] = {}
    for cubin, names in zip(cubins, units.values(), strict=True):
        kernels |= load_kernels(cubin, names)
    return kernels


def load_on(device_index: int, units: Units) -> dict[str, Kernel]:
    """`load_units` on a device that may not have been used yet."""
    with torch.cuda.device(device_index):
        torch.cuda.current_stream().synchronize()  # makes the context
        bind_context(device_index)
        return load_units(units)


def current_stream() -> int:
    """Of the current device, for calls of the driver, on a thread that may be new to CUDA."""
    device = torch._C._cuda_getDevice()
    bind_context(device)
    return int(torch._C._cuda_getCurrentRawStream(device))


def _enqueue_on(device_index: int, enqueue: Callable[[int], None]) -> None:
    """Calls `enqueue` with the device's current stream, on whatever thread and device the caller is."""
    if torch._C._cuda_getDevice() == device_index:
        enqueue(current_stream())
        return
    with torch.cuda.device(device_index):
        enqueue(current_stream())


def launch_on(
    device_index: int, kernel: Kernel, blocks: int, threads: int, shared_bytes: int, call: ctypes.Structure
) -> None:
    """Enqueues a kernel on the device's current stream, on whatever thread and device the caller is."""
    arguments = KernelArguments(call)
    _enqueue_on(device_index, lambda stream: kernel.launch(stream, blocks, threads, shared_bytes, arguments))


def zero_on(device_index: int, words: torch.Tensor) -> None:
    """Zeros in a contiguous tensor of 32-bit elements, like `launch_on`: one call of the driver."""
    _enqueue_on(device_index, lambda stream: fill_zero(words.data_ptr(), words.numel(), stream))
