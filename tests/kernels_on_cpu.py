"""Kernels of native/cuda on this CPU, a block in each copy of a library (native/tests/cuda_on_cpu)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NATIVE = Path(__file__).resolve().parents[1] / "native"
EMULATION = NATIVE / "tests" / "cuda_on_cpu"
OPTIONS = [
    "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off",
    "-fsanitize=undefined", "-fno-sanitize-recover=all",  # misaligned accesses, shifts too far, overflows
    "-fno-gnu-unique",  # each copy of a library has its own variables
    # The folder of the emulation comes first: its cuda/ptx.cuh and cuda/e4m3.cuh take the place of the real ones.
    f"-I{EMULATION}", f"-I{NATIVE}",
]  # fmt: skip

_RUN = """
extern "C" void run_{kernel}(unsigned number, unsigned num_blocks, unsigned num_threads, size_t shared_bytes,
                             const void* const* structs) {{
  cuda_on_cpu::run_block_of(commlib::cuda::{kernel}, number, num_blocks, num_threads, shared_bytes, structs);
}}
"""


class CpuKernels:
    """Kernels whose units have their names: compiled when first asked for, unless the folder has them; thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._free: dict[str, list[ctypes.CDLL]] = {}
        self._copies = tempfile.TemporaryDirectory()
        self._num_copies = 0
        self._blocks = ThreadPoolExecutor(64)

    def run(self, kernel: str, blocks: int, threads: int, shared_bytes: int, structs: tuple[Any, ...]) -> None:
        """All blocks at once, to their end, beside what other threads run.

        Args:
            kernel: name.
            blocks, threads, shared_bytes: of the launch.
            structs: the kernel's arguments.
        """
        pointers = (ctypes.c_void_p * len(structs))(*(ctypes.addressof(struct) for struct in structs))
        copies = self._take(kernel, blocks)
        size = ctypes.c_size_t(shared_bytes)
        running = [
            self._blocks.submit(getattr(copy, f"run_{kernel}"), number, blocks, threads, size, pointers)
            for number, copy in enumerate(copies)
        ]
        for block in running:
            block.result()
        with self._lock:
            self._free[kernel] += copies

    def _take(self, kernel: str, count: int) -> list[ctypes.CDLL]:
        with self._lock:
            if not (self._folder / f"{kernel}.so").exists():
                self.compile(kernel)
            free = self._free.setdefault(kernel, [])
            while len(free) < count:
                copy = Path(self._copies.name) / f"{kernel}-{self._num_copies}.so"
                self._num_copies += 1
                shutil.copy(self._folder / f"{kernel}.so", copy)
                free.append(ctypes.CDLL(str(copy)))
            taken, self._free[kernel] = free[:count], free[count:]
            return taken

    def compile(self, kernel: str) -> None:
        text = (NATIVE / "cuda" / f"{kernel}.cu").read_text()
        source = self._folder / f"{kernel}.cc"
        source.write_text("\n".join([f'#include "{EMULATION}/cuda_on_cpu.hpp"', text, _RUN.format(kernel=kernel)]))
        command = ["g++", *OPTIONS, "-o", str(self._folder / f"{kernel}.so"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
