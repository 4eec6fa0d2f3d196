"""Kernels from source to machine code: compiled at first use, kept on disk, checked for spilled registers.

The check looks at what the compiler reports about each kernel, so it runs on machines without a GPU, on exactly the
machine code that a GPU would load.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from commlib.cache import write_whole
from commlib.cuda import nvrtc
from commlib.cuda.params import layout_checks
from commlib.env import cache_folder
from commlib.errors import ConfigError

__all__ = ["ARCHITECTURE", "UNITS", "Resources", "compile_unit", "default_cache", "resources", "source_root"]

ARCHITECTURE = "sm_90a"

# Files of native/cuda that hold kernels; each becomes one module.
UNITS = (
    "exchange",
    "dispatch",
    "combine_bf16",
    "combine_f32",
    "tier_dispatch",
    "tier_combine_bf16",
    "tier_combine_f32",
    "latency_dispatch",
    "latency_combine",
    "gate",
    "dispatch_layout",
    "quant",
    "e5m6",
    "swiglu",
    "push_limit",
)

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)
_KERNEL = re.compile(r"Compiling entry function '(\w+)'")
_USED = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one kernel takes, according to the compiler. Bytes are per thread."""

    kernel: str
    registers: int
    stack_bytes: int
    spill_bytes: int


@cache
def source_root() -> Path:
    """The folder that `#include`s are relative to: next to this package in a source tree, inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    for root in (package / "native", package.parent / "native"):
        if (root / "cuda" / "params.cuh").is_file():
            return root
    raise ConfigError(f"the CUDA sources are neither in {package / 'native'} nor in {package.parent / 'native'}")


def default_cache() -> Path:
    """Where machine code is kept between runs."""
    return cache_folder() / "cuda"


def _options() -> list[str]:
    # --device-int128 and the like stay off: the sources use plain C++20 and the built-in functions only.
    return [
        f"--gpu-architecture={ARCHITECTURE}",
        "--std=c++20",
        f"--include-path={source_root()}",
        "--ptxas-options=-v",
        "--fmad=false",  # sums are rounded as written
    ]


def _sources(name: str, root: Path, seen: dict[str, str]) -> None:
    if name in seen:
        return
    text = (root / name).read_text()
    seen[name] = text
    for included in _INCLUDE.findall(text):
        _sources(included, root, seen)


def _unit_source(unit: str) -> tuple[str, str]:
    """What the compiler gets, and a hash of everything that the result depends on."""
    if unit not in UNITS:
        raise ConfigError(f"unit={unit!r} is not one of {'|'.join(UNITS)}")
    seen: dict[str, str] = {}
    _sources(f"cuda/{unit}.cu", source_root(), seen)
    source = f'#include "cuda/{unit}.cu"\n{layout_checks(unit)}'
    options = [option for option in _options() if not option.startswith("--include-path")]
    parts = [nvrtc.version(), *options, source, *(part for pair in sorted(seen.items()) for part in pair)]
    return source, hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def compile_unit(unit: str, cache: Path | None = None) -> tuple[bytes, str]:
    """The machine code of one of `UNITS` and the compiler's report on it.

    Args:
        unit: name of the file.
        cache: folder that keeps results, shared by any number of processes; None compiles anew.

    Raises:
        ConfigError: the source does not compile, or there is no compiler.
    """
    source, key = _unit_source(unit)
    cubin_file = None if cache is None else cache / f"{unit}-{key}.cubin"
    log_file = None if cache is None else cache / f"{unit}-{key}.log"
    if cubin_file is not None and log_file is not None and cubin_file.is_file() and log_file.is_file():
        return cubin_file.read_bytes(), log_file.read_text()
    cubin, log = nvrtc.compile_cubin(source, f"{unit}.cu", _options())
    if cubin_file is not None and log_file is not None:
        write_whole(log_file, log.encode())
        write_whole(cubin_file, cubin)
    return cubin, log


def resources(log: str) -> list[Resources]:
    """The kernels that a compiler's report tells about."""
    found: list[Resources] = []
    kernel, stack, spills = "", 0, 0
    for line in log.splitlines():
        if match := _KERNEL.search(line):
            kernel = match[1]
        elif match := _SPILLS.search(line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := _USED.search(line):
            found.append(Resources(kernel=kernel, registers=int(match[1]), stack_bytes=stack, spill_bytes=spills))
    return found
