"""Which memory the rings of the GPU executor get, agreed among ranks, without a GPU: host memory plays the device's."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import pytest
import torch
from moe_job import small_config
from test_tiers_host import open_tiers

import commlib.fabric as fabric_module
from commlib.bootstrap import connect
from commlib.cuda import rings as rings_module
from commlib.cuda.tiers import Tiers
from commlib.errors import CapacityError, ConfigError, TransportError
from commlib.testing.spawn import check_ranks

pytestmark = pytest.mark.multirank


class HostSegment:
    """Of the same size and life as a device's, but for the addresses."""

    made = 0

    def __init__(self, num_bytes: int) -> None:
        HostSegment.made += 1
        self.num_bytes = num_bytes
        self._memory = mmap.mmap(-1, num_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


class FabricWithReach:
    """A native Fabric that tells of another way to its peers."""

    def __init__(self, fabric: Any, reach: str) -> None:
        self._fabric, self._reach = fabric, reach

    def ring_reach(self) -> str:
        return self._reach

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fabric, name)


class Scene:
    """This rank, with a device that is not there. `reach`: what the transport says; None: the truth."""

    def __init__(self) -> None:
        self.boot = connect(None)
        self.reach: str | None = "direct"
        self.setup = ctypes.CDLL(None).sched_yield  # takes what it is given, returns 0, as the driver's do
        make = fabric_module.open_fabric

        def open_fabric(*arguments: Any, **options: Any) -> Any:
            fabric = make(*arguments, **options)
            return fabric if self.reach is None else FabricWithReach(fabric, self.reach)

        def thread_setup(device: int) -> tuple[int, int, int, int]:
            call = ctypes.cast(self.setup, ctypes.c_void_p).value or 0
            return call, device, call, 2

        fakes: dict[Any, dict[str, Any]] = {
            fabric_module: {"open_fabric": open_fabric},
            rings_module: {"Segment": HostSegment, "thread_setup": thread_setup},
            torch.cuda: {"current_device": lambda: 5},
        }
        for owner, names in fakes.items():
            for name, value in names.items():
                setattr(owner, name, value)

    def open(self, ring_memory: str) -> Tiers:
        return open_tiers(self.boot, small_config(num_sms=6, ring_memory=ring_memory), [])

    def close(self, tiers: Tiers, *, is_quiet: bool = True) -> None:
        self.boot.barrier(30)
        tiers.close(is_quiet=is_quiet)
        self.boot.barrier(30)


def device_rank() -> None:
    """Device memory is taken, kept, and used again unless somebody may still write there."""
    scene = Scene()
    host = scene.open("host")
    assert "; rings in pinned host memory; " in host.describe() and HostSegment.made == 0
    scene.close(host)
    for _ in range(2):
        tiers = scene.open("device")
        assert "; rings in GPU memory; " in tiers.describe() and "fence by flush" in tiers.describe()
        assert tiers.registered_bytes == host.registered_bytes and HostSegment.made == 1
        assert tiers.fault() is None and tiers.counters()["data_bytes"] == 0
        scene.close(tiers)
    scene.close(scene.open("device"), is_quiet=False)
    scene.close(scene.open("device"))
    assert HostSegment.made == 2


def refusal_rank() -> None:
    """What one rank lacks is an error of all that names it."""
    scene = Scene()
    rank = scene.boot.rank

    def expect(reason: str) -> None:
        with pytest.raises((ConfigError, CapacityError, TransportError), match=reason):
            scene.open("device")
        scene.boot.barrier(30)

    scene.reach = "staged" if rank == 2 else "direct"
    tiers = scene.open("device")  # slow, but asked for
    assert "rings in GPU memory" in tiers.describe()
    scene.close(tiers)
    scene.reach = None if rank == 2 else "direct"  # UCX sees the host memory that this is
    expect("rank 2: the transport takes GPU memory for the host's")
    scene.reach = "direct"
    assert HostSegment.made == 1  # never put into so far: all of these used it
    if rank == 2:
        scene.setup = ctypes.CDLL(None).getpid  # anything but 0
    # Whoever hears of it first says so.
    expect(r"rank \d: no put between GPUs: rank 2: the thread has no context of the device")

    def full(num_bytes: int) -> HostSegment:
        raise CapacityError("no room on the device", needed=num_bytes, available=0)

    scene.setup = ctypes.CDLL(None).sched_yield
    if rank == 2:
        rings_module.Segment = full  # type: ignore[assignment,misc]
        rings_module._unused.clear()
    expect("rank 2: no room on the device")


def test_device_memory_is_used_again() -> None:
    check_ranks("test_rings_host:device_rank", 4, ranks_per_node=2, env={"UCX_TLS": "tcp,self"}, timeout_s=100)


def test_what_one_rank_lacks_decides_for_all() -> None:
    check_ranks("test_rings_host:refusal_rank", 4, ranks_per_node=2, env={"UCX_TLS": "tcp,self"}, timeout_s=100)
