"""Machines that are too small: a full /dev/shm, little lockable memory. Functions named *_rank run on every rank."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import commlib
from commlib.testing.spawn import check_ranks
from commlib.topology import Topology

pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem
HIDDEN = 1024
MIB = 1 << 20


def open_runtime(nodes: tuple[int, ...], **changes: Any) -> commlib.Runtime:
    values: dict[str, Any] = {
        "hidden": HIDDEN,
        "num_experts": 2 * len(nodes),
        "num_topk": 2,
        "expert_alignment": 1,
        "arena_bytes": 4096,
        "timeout_s": 60.0,
        **changes,
    }
    return commlib.Runtime(None, commlib.RuntimeConfig(**values), topology=Topology(nodes))


def send_all_to(runtime: commlib.Runtime, target: int, num_tokens: int) -> Any:
    """Every token to both experts of one rank: 8 KiB each there."""
    x = np.full((num_tokens, HIDDEN), runtime.rank + 1, dtype=np.float32)
    idx = np.tile(np.array([[2 * target, 2 * target + 1]], dtype=np.int64), (num_tokens, 1))
    got = runtime.dispatch(x, idx)
    assert got.x.shape == (2 * runtime.num_ranks * num_tokens * (runtime.rank == target), HIDDEN)
    assert (runtime.combine(got.x, got.handle).x == 2 * x).all()
    return got


# --- /dev/shm -----------------------------------------------------------------------------------------------------

SHM_MIB = 64


def small_shm_rank() -> None:
    nodes = (0, 0)
    fix = r"enlarge it \(docker run --shm-size=2g, or mount -o remount,size=2g /dev/shm\) or lower max_tokens / arena_b"

    # One rank alone asks for more than there is: both hear of it.
    rank = int(os.environ["COMMLIB_RANK"])
    with pytest.raises(commlib.CapacityError, match=rf"^rank 1: shared memory of 8\d MiB does not fit: .*{fix}") as at:
        open_runtime(nodes, arena_bytes=80 * MIB if rank == 1 else 4096)
    assert at.value.needed > 80 * MIB and 0 < at.value.available <= SHM_MIB * MIB
    # The default of a large shape: both are too large.
    with pytest.raises(commlib.CapacityError, match=rf"^rank 0: shared memory of \d+ MiB does not fit: .*{fix}"):
        open_runtime(nodes, arena_bytes=None, max_tokens=65536)

    with open_runtime(nodes) as runtime:
        kept = send_all_to(runtime, 0, 1000)  # 16 MiB there
        before = runtime.memory()
        # 66 MiB more on rank 0.
        with pytest.raises(commlib.CapacityError, match=rf"^rank 0: shared memory of \d+ MiB does not .*{fix}") as at:
            send_all_to(runtime, 0, 4200)
        assert at.value.needed > 64 * MIB > at.value.available >= 0
        assert runtime.memory() == before  # what was tried went back
        for target in (1, 0):
            send_all_to(runtime, target, 900)  # less fits, on the rank that failed too
        assert rank == 1 or (kept.x == 1).sum() == (kept.x == 2).sum() == 2000 * HIDDEN
    print(json.dumps({"free": free_shm(), "size": SHM_MIB * MIB}))


def free_shm() -> int:
    stat = os.statvfs("/dev/shm")
    return stat.f_bavail * stat.f_frsize


def inside_namespace() -> None:
    """The ranks, in a mount namespace of their own with a small /dev/shm."""
    stat = os.statvfs("/dev/shm")
    assert stat.f_blocks * stat.f_frsize == SHM_MIB * MIB
    results = check_ranks(f"{HERE}:small_shm_rank", 2, timeout_s=60)
    assert len(results) == 2
    # Nobody maps any of it any more: nothing was left behind.
    print(free_shm() == SHM_MIB * MIB)


@pytest.mark.root
def test_full_shared_memory_is_an_error_with_its_fix() -> None:
    """At construction, and when a dispatch has to grow; no SIGBUS, and the Runtime goes on with less."""
    tests = str(Path(__file__).parent)
    python = f"import sys; sys.path.insert(0, {tests!r}); import {HERE}; {HERE}.inside_namespace()"
    mount = f"mount -t tmpfs -o size={SHM_MIB}m tmpfs /dev/shm"
    shell = ["unshare", "--mount", "sh", "-ec", f'{mount}; exec "$0" -c "$1"', sys.executable, python]
    done = subprocess.run(shell, capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


# --- locked memory ------------------------------------------------------------------------------------------------


def little_memlock_rank() -> None:
    """Rings of 32 MiB in all, hardly any of which may be locked: shared memory and TCP need none of it locked."""
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))
    with open_runtime((0, 1), ring_bytes=8 * MIB) as runtime:
        assert runtime.memory().registered_bytes > 32 * MIB
        send_all_to(runtime, 0, 300)
        send_all_to(runtime, 1, 300)
        print(runtime.describe())


def test_little_lockable_memory_is_enough_without_rdma() -> None:
    for result in check_ranks(f"{HERE}:little_memlock_rank", 2, timeout_s=60):
        assert "ucx" in result.stdout, result.stdout
