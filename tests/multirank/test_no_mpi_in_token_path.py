"""Tokens travel without MPI and without torch.distributed: both are there, and neither is called.

A library that is loaded before MPI counts the calls of MPI functions and passes them on. Functions named *_rank run on
every rank.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import commlib
from commlib.testing.spawn import check_ranks, free_port
from commlib.topology import Topology

pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem
NODES = {4: Topology((0, 0, 1, 1)), 3: Topology((0, 0, 1))}
NUM_ROUNDS = 20

# Everything that moves data, synchronises or makes something that does; with the large-count forms (_c) of MPI 4.
FUNCTIONS = """
Send Recv Ssend Bsend Rsend Isend Issend Ibsend Irsend Irecv Sendrecv Sendrecv_replace Isendrecv Mrecv Imrecv Psend_init
Precv_init Send_init Recv_init Start Startall Probe Iprobe Mprobe Improbe Test Testall Testany Testsome Wait Waitall
Waitany Waitsome Request_free Cancel Barrier Ibarrier Bcast Ibcast Gather Gatherv Igather Igatherv Scatter Scatterv
Iscatter Iscatterv Allgather Allgatherv Iallgather Iallgatherv Alltoall Alltoallv Alltoallw Ialltoall Ialltoallv
Ialltoallw Reduce Ireduce Allreduce Iallreduce Reduce_scatter Ireduce_scatter Reduce_scatter_block Scan Iscan Exscan
Iexscan Neighbor_allgather Neighbor_allgatherv Neighbor_alltoall Neighbor_alltoallv Put Get Rput Rget Accumulate
Raccumulate Get_accumulate Fetch_and_op Compare_and_swap Win_create Win_allocate Win_allocate_shared Win_create_dynamic
Win_attach Win_detach Win_shared_query Win_fence Win_lock Win_lock_all Win_unlock Win_unlock_all Win_flush Win_flush_all
Win_flush_local Win_flush_local_all Win_sync Win_start Win_complete Win_post Win_wait Win_test Win_free Comm_dup
Comm_idup Comm_split Comm_split_type Comm_create Comm_create_group Comm_free
""".split()  # noqa: SIM905

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static atomic_long calls;
static _Thread_local char last[64];
long counted_calls(void) { return atomic_load(&calls); }
const char* last_call(void) { return last; }

/* MPI is loaded by dlopen and in nobody's global scope: found among the libraries that are mapped. */
static void* find(const char* name) {
  char line[4096], path[4096];
  FILE* maps = fopen("/proc/self/maps", "r");
  void* found = NULL;
  while (maps && !found && fgets(line, sizeof line, maps)) {
    const char* at = strchr(line, '/');
    if (!at || !strstr(at, "/libmpi")) continue;
    snprintf(path, sizeof path, "%s", at);
    path[strcspn(path, "\n")] = 0;
    void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (library) found = dlsym(library, name);
  }
  if (maps) fclose(maps);
  if (!found) { fprintf(stderr, "no %s\n", name); abort(); }
  return found;
}

/* Arguments of MPI functions are integers and pointers; further ones than the function has do no harm. */
#define T long
typedef int (*Function)(T, T, T, T, T, T, T, T, T, T, T, T);
#define COUNTED(name)                                                                       \
  int MPI_##name(T a, T b, T c, T d, T e, T f, T g, T h, T i, T j, T k, T l) {              \
    static _Atomic(Function) next;                                                          \
    if (!next) next = (Function)find("PMPI_" #name);                                        \
    atomic_fetch_add(&calls, 1);                                                            \
    snprintf(last, sizeof last, "%s", #name);                                               \
    return next(a, b, c, d, e, f, g, h, i, j, k, l);                                        \
  }
"""


def compile_counter(folder: Path) -> Path:
    names = FUNCTIONS + [f"{name}_c" for name in FUNCTIONS if not name.startswith(("Comm_", "Win_"))]
    source, library = folder / "counter.c", folder / "counter.so"
    source.write_text(SOURCE + "".join(f"COUNTED({name})\n" for name in names))
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def make_runtime(group: Any, num_ranks: int) -> commlib.Runtime:
    settings = commlib.RuntimeConfig(
        hidden=64, num_experts=12, num_topk=2, max_tokens=16, expert_alignment=1, arena_bytes=4096, timeout_s=30.0
    )
    return commlib.Runtime(group, settings, topology=NODES[num_ranks])


def use(runtime: commlib.Runtime) -> None:
    """Dispatches of growing size (the arena grows), combines, refused calls and a barrier."""
    import numpy as np

    for number in range(NUM_ROUNDS):
        num_tokens = (number * 7 + runtime.rank) % 40
        x = np.full((num_tokens, 64), runtime.rank + 1.0, dtype=np.float32)
        tokens = np.arange(num_tokens)
        idx = np.stack([tokens % 12, (tokens + 5) % 12], axis=1).astype(np.int64)
        got = runtime.dispatch(x, idx)
        assert (np.asarray(runtime.combine(got.x, got.handle).x) == 2 * x).all()
        runtime.barrier()
    with pytest.raises(commlib.ConfigError, match="occurs twice"):
        runtime.dispatch(np.zeros((1, 64), dtype=np.float32), np.zeros((1, 2), dtype=np.int64))


# --- MPI ----------------------------------------------------------------------------------------------------------


def mpi_rank() -> None:
    from mpi4py import MPI

    counter = ctypes.CDLL(os.environ["LD_PRELOAD"])
    counter.last_call.restype = ctypes.c_char_p

    def count(call: Callable[[], Any]) -> int:
        before = int(counter.counted_calls())
        call()
        return int(counter.counted_calls()) - before

    world = MPI.COMM_WORLD
    # The counter counts, and says what: each function stands for a family.
    assert count(world.Barrier) == 1 and counter.last_call() == b"Barrier"
    assert count(lambda: world.allreduce(1)) >= 1 and count(lambda: world.Dup().Free()) == 2
    requests = [world.Isend([b"x", MPI.BYTE], dest=(world.rank + 1) % 4, tag=1)]
    assert count(lambda: world.Recv([bytearray(1), MPI.BYTE], source=(world.rank - 1) % 4, tag=1)) == 1
    assert count(lambda: MPI.Request.Waitall(requests)) == 1 and count(lambda: world.Iprobe()) == 1
    made: list[commlib.Runtime] = []
    assert count(lambda: made.append(make_runtime(world, 4))) > 10  # the bootstrap is MPI's

    assert count(lambda: use(made[0])) == 0, counter.last_call()
    assert count(made[0].close) == 0, counter.last_call()


def test_no_mpi_call_between_construction_and_close(tmp_path: Path) -> None:
    env = {"LD_PRELOAD": str(compile_counter(tmp_path))}
    check_ranks(f"{HERE}:mpi_rank", 4, launcher="mpirun", env=env, timeout_s=60)


# --- torch.distributed --------------------------------------------------------------------------------------------


class Forbidden(Exception):
    """torch.distributed was called."""


def forbid_collectives(patch: pytest.MonkeyPatch) -> int:
    """Every public function of torch.distributed and every method of its groups and stores raises; how many."""
    import torch.distributed as dist

    def forbidden(*args: object, **kwargs: object) -> None:
        raise Forbidden

    num_patched = 0
    for module in (dist, dist.distributed_c10d):
        for name, value in vars(module).copy().items():
            if not name.startswith("_") and inspect.isfunction(value):
                patch.setattr(module, name, forbidden)
                num_patched += 1
    for cls in (dist.ProcessGroup, dist.distributed_c10d.Store, dist.distributed_c10d.PrefixStore):
        for name in vars(cls).copy():
            if not name.startswith("_") and callable(getattr(cls, name)):
                patch.setattr(cls, name, forbidden)
                num_patched += 1
    return num_patched


def torch_rank(port: int) -> None:
    import torch
    import torch.distributed as dist

    rank = int(os.environ["COMMLIB_RANK"])
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    world = dist.group.WORLD
    assert world is not None
    runtime = make_runtime(world, 3)
    with pytest.MonkeyPatch.context() as patch:
        assert forbid_collectives(patch) > 100
        for collective in (dist.barrier, lambda: dist.all_gather([], torch.zeros(1)), world.barrier):
            with pytest.raises(Forbidden):
                collective()
        use(runtime)
        runtime.close()
    dist.barrier()
    dist.destroy_process_group()


def test_no_torch_collective_between_construction_and_close() -> None:
    check_ranks(f"{HERE}:torch_rank", 3, args=[free_port()], timeout_s=100)


def test_the_counter_sees_what_mpi_has() -> None:
    """Names that MPI does not know would count nothing: each is a function of the installed library."""
    from_mpi = subprocess.run(
        [sys.executable, "-c", "import mpi4py.MPI; print(open('/proc/self/maps').read())"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = {line.split()[-1] for line in from_mpi.splitlines() if "/libmpi" in line}
    libraries = [ctypes.CDLL(path) for path in paths]
    assert libraries
    assert [name for name in FUNCTIONS if not any(hasattr(library, f"PMPI_{name}") for library in libraries)] == []
