"""Modules and launches through the CUDA driver: one plain struct after another as parameters, nothing converted."""

from __future__ import annotations

import ctypes
from functools import cache

from commlib.errors import TransportError

__all__ = [
    "Event",
    "Kernel",
    "KernelArguments",
    "bind_context",
    "export_dmabuf",
    "fill_zero",
    "has_ordered_rdma",
    "load_kernels",
    "map_host_memory",
    "thread_setup",
    "unmap_host_memory",
]

_DISABLE_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

_HOST_PORTABLE, _HOST_DEVICEMAP = 1, 2  # CU_MEMHOSTREGISTER_*
_NOT_READY = 600  # CUDA_ERROR_NOT_READY
_ALREADY_REGISTERED = 712  # CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED

_USES_HOST_PAGE_TABLES = 100  # CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES
_RDMA_WRITES_ORDERING = 118  # CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING
_ORDERED_FOR_OWNER = 100  # CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER
_CAPTURE_MODE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_DMA_BUF_FD = 1  # CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD

_Pointer = ctypes.c_void_p


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


@cache
def _primary_context(device_index: int) -> ctypes.c_void_p:
    """What torch uses as well; kept until the process ends."""
    context = ctypes.c_void_p()
    _check("cuDevicePrimaryCtxRetain", _library().cuDevicePrimaryCtxRetain(ctypes.byref(context), device_index))
    return context


def bind_context(device_index: int) -> None:
    """Before calls of the driver: a thread that has not used CUDA yet, autograd's for one, has no context for them,
    whatever its current device is called."""
    context = ctypes.c_void_p()
    _check("cuCtxGetCurrent", _library().cuCtxGetCurrent(ctypes.byref(context)))
    if not context:
        _check("cuCtxSetCurrent", _library().cuCtxSetCurrent(_primary_context(device_index)))


def thread_setup(device_index: int) -> tuple[int, int, int, int]:
    """For native threads that use the device: cuCtxSetCurrent and its argument; cuThreadExchangeStreamCaptureMode and
    the mode in which queries of events are allowed while another thread captures a graph."""
    library = _library()
    addresses = [
        ctypes.cast(library.cuCtxSetCurrent, _Pointer).value,
        _primary_context(device_index).value,
        ctypes.cast(library.cuThreadExchangeStreamCaptureMode, _Pointer).value,
    ]
    set_context, context, exchange_mode = (address or 0 for address in addresses)
    return set_context, context, exchange_mode, _CAPTURE_MODE_RELAXED


def has_ordered_rdma(device_index: int) -> bool:
    """Whether kernels of the device see what a network card has written to it, without a flush, once they see a word of
    host memory that it has written later.

    Not where such words come by a link of the processor's own (C2C), and data do not: docs/design.md, section 8.
    """

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        _check("cuDeviceGetAttribute", _library().cuDeviceGetAttribute(ctypes.byref(value), number, device_index))
        return value.value

    return attribute(_RDMA_WRITES_ORDERING) >= _ORDERED_FOR_OWNER and attribute(_USES_HOST_PAGE_TABLES) == 0


def export_dmabuf(address: int, num_bytes: int) -> int:
    """A file descriptor of device memory for other drivers, the caller's to close; -1: this driver has none.

    Args:
        address, num_bytes: multiples of the host's page.
    """
    descriptor = ctypes.c_int(-1)
    code = _library().cuMemGetHandleForAddressRange(
        ctypes.byref(descriptor),
        ctypes.c_uint64(address),
        ctypes.c_size_t(num_bytes),
        _DMA_BUF_FD,
        ctypes.c_ulonglong(0),
    )
    return descriptor.value if code == 0 else -1


def fill_zero(address: int, num_words: int, stream: int) -> None:
    """Enqueues zeros for 32-bit words of device memory."""
    _check(
        "cuMemsetD32Async",
        _library().cuMemsetD32Async(ctypes.c_uint64(address), 0, ctypes.c_size_t(num_words), _Pointer(stream)),
    )


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

    def launch(self, stream: int, blocks: int, threads: int, shared_bytes: int, arguments: KernelArguments) -> None:
        """Enqueues the kernel, with what the structs hold now; returns at once."""
        code = _library().cuLaunchKernel(
            self._function, blocks, 1, 1, threads, 1, 1, shared_bytes, _Pointer(stream), arguments.pointers, None
        )
        if code:
            _check(f"cuLaunchKernel({self.name})", code)


class KernelArguments:
    """Structs as a kernel takes them, one by one."""

    def __init__(self, *structs: ctypes.Structure) -> None:
        self.structs = structs  # kept: the pointers are of these
        self.pointers = (_Pointer * len(structs))(*(ctypes.addressof(struct) for struct in structs))


class Event:
    """A CUDA event without timing, of the thread's current context."""

    def __init__(self) -> None:
        self._event, self._destroy = _Pointer(), _library().cuEventDestroy_v2
        _check("cuEventCreate", _library().cuEventCreate(ctypes.byref(self._event), _DISABLE_TIMING))

    def record(self, stream: int) -> None:
        _check("cuEventRecord", _library().cuEventRecord(self._event, _Pointer(stream)))

    def wait(self, stream: int) -> None:
        """What is enqueued on the stream from now on comes after the event as it was recorded last."""
        _check("cuStreamWaitEvent", _library().cuStreamWaitEvent(_Pointer(stream), self._event, 0))

    def has_passed(self) -> bool:
        """Whether the device has come to the event as it was recorded last."""
        code = _library().cuEventQuery(self._event)
        if code != _NOT_READY:
            _check("cuEventQuery", code)
        return bool(code == 0)

    def synchronize(self) -> None:
        _check("cuEventSynchronize", _library().cuEventSynchronize(self._event))

    def __del__(self) -> None:
        if self._event:
            self._destroy(self._event)


def map_host_memory(address: int, num_bytes: int) -> tuple[int, bool]:
    """Pins host memory for kernels of the current context.

    Returns:
        The address that kernels use, and whether it is ours to unpin: a UCX that serves device memory pins what it
        registers.
    """
    library, device = _library(), ctypes.c_uint64()
    flags = _HOST_PORTABLE | _HOST_DEVICEMAP
    code = library.cuMemHostRegister_v2(_Pointer(address), ctypes.c_size_t(num_bytes), flags)
    if code != _ALREADY_REGISTERED:
        _check("cuMemHostRegister", code)
    _check(
        "cuMemHostGetDevicePointer", library.cuMemHostGetDevicePointer_v2(ctypes.byref(device), _Pointer(address), 0)
    )
    return int(device.value), code == 0


def unmap_host_memory(address: int) -> None:
    """Takes back `map_host_memory`; no kernel uses it any more."""
    _check("cuMemHostUnregister", _library().cuMemHostUnregister(_Pointer(address)))


def load_kernels(cubin: bytes, names: dict[str, int]) -> dict[str, Kernel]:
    """Loads machine code into the current context.

    Args:
        cubin: the module.
        names: kernels and the most dynamic shared memory that a launch of each will ask for.
    """
    module = ctypes.c_void_p()
    _check("cuModuleLoadData", _library().cuModuleLoadData(ctypes.byref(module), cubin))
    return {name: Kernel(module, name, shared_bytes) for name, shared_bytes in names.items()}
