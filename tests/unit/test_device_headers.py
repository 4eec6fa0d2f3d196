"""The headers of native/layout and native/channel compile for the device: NVRTC needs neither a GPU nor nvcc."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"
HEADERS = sorted(
    str(path.relative_to(NATIVE)) for part in ("layout", "channel") for path in NATIVE.glob(f"{part}/*.hpp")
)

# One use of everything an SM does with a channel: read a record, fill a slot, hand a command to the proxy, wait.
KERNEL = (
    "".join(f'#include "{header}"\n' for header in HEADERS)
    + """
using namespace commlib;

extern "C" __global__ void send(FifoMemory fifo, const void* record, const uint64_t* counter, uint64_t epoch,
                                size_t row_bytes, int num_topk, uint64_t* arrived) {
  const SlotLayout slot = make_slot(row_bytes, 0, record_bytes(num_topk));
  const RingGeometry ring = make_ring(1 << 20, 1 << 16, slot.slot_bytes, 64);
  FifoProducer producer{fifo};
  CommandFields fields{};
  fields.kind = CommandKind::kPut;
  fields.channel = record_entries(record)[threadIdx.x].expert;
  fields.bytes = static_cast<uint32_t>(slot.slot_bytes);
  fields.dst_offset = ring.slot_offset(blockIdx.x);
  while (!producer.push(encode(fields))) {
  }
  *arrived = arrived_in(load_acquire(counter), epoch, num_chunks_of(ring, 64));
}
"""
)


@cache
def nvrtc() -> ctypes.CDLL:
    """The library of the nvidia-cuda-nvrtc wheel, a namespace package without Python code."""
    spec = importlib.util.find_spec("nvidia.cu13")
    assert spec is not None and spec.submodule_search_locations, "pip install nvidia-cuda-nvrtc"
    (library,) = (path for place in spec.submodule_search_locations for path in Path(place).glob("lib/libnvrtc.so.*"))
    return ctypes.CDLL(str(library))


def compile_for_device(source: str) -> bytes:
    """The cubin for sm_90a; raises AssertionError with the compiler's log."""
    library = nvrtc()
    program = ctypes.c_void_p()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    options = [b"--gpu-architecture=sm_90a", b"--std=c++20", b"--include-path=" + bytes(NATIVE)]
    try:
        status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = _read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        assert status == 0 and not log, log  # no warnings either
        return _read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(get_size: Callable[..., int], get: Callable[..., int], program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    assert get_size(program, ctypes.byref(size)) == 0
    buffer = ctypes.create_string_buffer(size.value)
    assert get(program, buffer) == 0
    return buffer.raw


@pytest.mark.parametrize("header", HEADERS)
def test_header_compiles_alone(header: str) -> None:
    assert compile_for_device(f'#include "{header}"\n').startswith(b"\x7fELF")


def test_kernel_uses_the_channel() -> None:
    cubin = compile_for_device(KERNEL)
    assert cubin.startswith(b"\x7fELF") and b".text.send\0" in cubin


def test_standard_headers_are_not_there() -> None:
    with pytest.raises(AssertionError, match="vector"):
        compile_for_device("#include <vector>\n")
