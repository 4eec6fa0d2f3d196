"""Which CPUs are near a GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["cpus_near", "parse_cpu_list"]


def cpus_near(device: Any, sysfs: Path = Path("/sys/bus/pci/devices")) -> list[int]:
    """CPUs of the device's NUMA node that this process may use; none if that is not known."""
    import cupy

    bus_id: str = cupy.cuda.Device(torch.device(device).index).pci_bus_id
    try:
        near = parse_cpu_list((sysfs / bus_id.lower() / "local_cpulist").read_text())
    except OSError:
        return []
    return sorted(near & os.sched_getaffinity(0))


def parse_cpu_list(text: str) -> set[int]:
    """The kernel's form of a set of CPUs, "0-3,8"."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return found
