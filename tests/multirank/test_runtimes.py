"""Several Runtimes, groups of several kinds, and processes without mpi4py or torch. *_rank run on every rank."""

from __future__ import annotations

import builtins
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest

from commlib.testing.spawn import check_ranks, free_port

if TYPE_CHECKING:
    from commlib.runtime import Runtime

# Nothing here imports torch at the top: one of the tests is about a process without it.
pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem
HIDDEN = 128


def config(num_ranks: int, **changes: Any) -> Any:
    from commlib.config import RuntimeConfig

    values: dict[str, Any] = {
        "hidden": HIDDEN,
        "num_experts": 2 * num_ranks,
        "num_topk": 2,
        "max_tokens": 32,
        "expert_alignment": 4,
        "chunk_bytes": 4096,
        "ring_bytes": 8192,
        "arena_bytes": 1 << 18,
        "timeout_s": 60.0,
        "heartbeat_timeout_s": 30.0,
        **changes,
    }
    return RuntimeConfig(**values)


def round_trip(runtime: Runtime, salt: int, as_array: Any = np.asarray) -> None:
    """Every token goes to two neighbours and comes back: each rank checks what it received, token by token.

    Token t of rank r is filled with 64 * salt + 8 * r + t (exact in BF16 for salt < 4) and goes to the first experts
    of ranks r and r + 1, its weight for r + 1 being -0.5.
    """
    rank, size = runtime.rank, runtime.num_ranks
    num_tokens = 3 + rank % 3

    def value(source: int, token: int) -> float:
        return 64 * salt + 8 * source + token

    x = np.array([[value(rank, token)] * HIDDEN for token in range(num_tokens)], dtype=np.float32)
    next_rank = (rank + 1) % size
    idx = np.array([[2 * rank, 2 * next_rank + (size == 1)]] * num_tokens, dtype=np.int64)
    weights = np.array([[1.0, -0.5]] * num_tokens, dtype=np.float32)
    got = runtime.dispatch(as_array(x), idx, weights)
    sources = sorted({rank, (rank - 1) % size})
    expected = [(value(source, token), source) for source in sources for token in range(3 + source % 3)]
    assert got.num_tokens_per_expert[0] == len(expected)
    rows = np.asarray(got.x).astype(np.float32)
    for place, (number, source) in enumerate(expected):
        assert (rows[place] == number).all(), (rank, place, number, rows[place])
        assert float(got.row_weights[place]) == (1.0 if source == rank else -0.5)
    combined = runtime.combine(got.x, got.handle, weights=got.row_weights)
    assert type(combined.x) is type(got.x) and combined.x.dtype == got.x.dtype
    out = np.asarray(combined.x).astype(np.float32)
    assert (out == x * 0.5).all()


# --- one process, several Runtimes --------------------------------------------------------------------------------


def several_rank(rendezvous: int) -> None:
    from commlib.bootstrap.rendezvous import RendezvousBootstrap
    from commlib.runtime import Runtime
    from commlib.topology import Topology

    rank = int(os.environ["COMMLIB_RANK"])
    group = RendezvousBootstrap(endpoint=f"tcp://127.0.0.1:{rendezvous}", token="test", rank=rank, size=4, timeout_s=60)
    one_node, two_nodes = Topology((0, 0, 0, 0)), Topology((0, 0, 1, 1))
    first = Runtime(group, config(4), topology=two_nodes)
    second = Runtime(group, config(4), topology=one_node)
    for salt in range(4):
        round_trip((first, second)[salt % 2], salt)
    use_from_two_threads([first, second])
    first.close()
    round_trip(second, 1)
    rebuilt = Runtime(group, config(4, hidden=HIDDEN), topology=two_nodes)  # with the second still open
    use_from_two_threads([rebuilt, second])
    second.close()
    round_trip(rebuilt, 2)
    with Runtime(None, config(4), topology=one_node) as by_environment:
        round_trip(by_environment, 3)
    rebuilt.close()
    group.close()


def use_from_two_threads(runtimes: Sequence[Runtime]) -> None:
    """One thread per Runtime, at once."""
    errors: list[BaseException] = []

    def work(runtime: Runtime) -> None:
        try:
            for salt in range(12):
                round_trip(runtime, salt % 4)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[runtime]) for runtime in runtimes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive()
    assert errors == []


def test_several_runtimes_by_turns_at_once_and_again() -> None:
    check_ranks(f"{HERE}:several_rank", 4, args=[free_port()], timeout_s=120)


# --- disjoint groups ----------------------------------------------------------------------------------------------


def use_group(group: Any, rank: int, size: int, *, number: int) -> None:
    """Groups work at once, each with tokens of its own `number`, on one node and on as many nodes as ranks."""
    from commlib.runtime import Runtime
    from commlib.topology import Topology

    for nodes in ((0,) * size, tuple(range(size))):
        with Runtime(group, config(size), topology=Topology(nodes)) as runtime:
            assert (runtime.rank, runtime.num_ranks) == (rank, size)
            for _ in range(3 + number):  # groups need not keep step
                round_trip(runtime, number)


def torch_groups_rank(port: int) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank = int(os.environ["COMMLIB_RANK"])
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank))  # for the mesh
    groups = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    use_group(groups[rank in (1, 2)], int(rank in (2, 3)), 2, number=int(rank in (1, 2)))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    use_group(mesh["ep"], rank % 2, 2, number=rank // 2)
    use_group(mesh["dp"], rank // 2, 2, number=rank % 2)
    use_group(dist.group.WORLD, rank, 4, number=3)
    dist.barrier()
    dist.destroy_process_group()


def test_torch_subgroups_and_mesh_dimensions() -> None:
    check_ranks(f"{HERE}:torch_groups_rank", 4, args=[free_port()], timeout_s=150)


def mpi_groups_rank() -> None:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    half = world.Split(color=world.rank % 2, key=-world.rank)  # 2, 0 and 3, 1 in that order
    use_group(half, int(world.rank < 2), 2, number=world.rank % 2)
    use_group(world, world.rank, 4, number=3)
    use_group(MPI.COMM_SELF, 0, 1, number=world.rank)
    assert "torch" not in sys.modules
    half.Free()


def test_mpi_communicators_of_disjoint_ranks() -> None:
    check_ranks(f"{HERE}:mpi_groups_rank", 4, launcher="mpirun", timeout_s=120)


# --- what need not be installed -----------------------------------------------------------------------------------


def forbid(*names: str) -> list[str]:
    """Makes modules look as if they were not installed; the list fills with what is imported of them all the same."""
    asked: list[str] = []
    real_import = builtins.__import__

    def watched(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in names:
            asked.append(name)
        return real_import(name, *args, **kwargs)

    for name in names:
        assert name not in sys.modules
        sys.modules[name] = None  # type: ignore[assignment]  # what Python takes for "not to be found"
    builtins.__import__ = watched
    return asked


def bare_rank() -> None:
    """Plain processes with numpy only: no torch, no mpi4py, BF16 and FP8 by ml_dtypes."""
    asked = forbid("torch", "mpi4py")
    with pytest.raises(ModuleNotFoundError):
        import torch  # noqa: F401
    assert asked.pop() == "torch"
    import ml_dtypes

    import commlib

    bfloat16, float8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
    settings = config(2)
    with commlib.Runtime(None, settings) as runtime:
        for salt in range(4):
            round_trip(runtime, salt)
            round_trip(runtime, salt, lambda x: x.astype(bfloat16))
            round_trip(runtime, salt, lambda x: x.astype(">f4"))
            round_trip(runtime, salt, lambda x: np.stack([x, -x], axis=2)[:, :, 0])  # strided
        check_fp8(runtime, bfloat16, float8)
        assert runtime.topology.num_nodes == 1
    assert asked == []


def check_fp8(runtime: Runtime, bfloat16: Any, float8: Any) -> None:
    x = np.full((2, HIDDEN), 3.0, dtype=bfloat16)
    x[1] = 0
    idx = np.array([[0, 2], [1, 3]], dtype=np.int64)
    cast = runtime.dispatch(x, idx, fp8="pow2")
    assert cast.x.dtype == float8 and cast.scales.dtype == np.float32
    # 3 / 448 rounded up to a power of two is 2^-7; 3 * 2^7 = 384 is an E4M3 number. Two experts, two sources each.
    assert cast.x.shape == (8, HIDDEN) and (cast.x[:2].astype(np.float32) == 384).all()
    assert (cast.scales[:2] == 2.0**-7).all() and (cast.x[2:].astype(np.float32) == 0).all()
    again = runtime.dispatch(x.astype(float8), scales=np.ones((2, 1), dtype=np.float32), handle=cast.handle)
    assert again.x.dtype == float8 and (again.x[:2].astype(np.float32) == 3).all() and (again.scales[:2] == 1).all()


def test_numpy_alone_is_enough() -> None:
    check_ranks(f"{HERE}:bare_rank", 2, timeout_s=60)


# --- more ranks ---------------------------------------------------------------------------------------------------


def many_rank(nodes: list[int]) -> None:
    import commlib
    from commlib.topology import Topology

    with commlib.Runtime(None, config(len(nodes)), topology=Topology(tuple(nodes))) as runtime:
        for salt in range(3):
            round_trip(runtime, salt)
    assert "torch" not in sys.modules


@pytest.mark.parametrize("nodes", [[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 0, 2, 2]], ids=["2+2+2", "2+4+2"])
def test_six_and_eight_ranks_on_three_nodes(nodes: list[int]) -> None:
    check_ranks(f"{HERE}:many_rank", len(nodes), args=[nodes], timeout_s=100)


def unequal_rank() -> None:
    """What one rank alone has, or lacks, is for all to know before anybody acts on it."""
    import commlib
    from commlib import _native, cpu_executor

    rank = int(os.environ["COMMLIB_RANK"])
    _native.has_verbs = lambda options: rank == 0
    with commlib.Runtime(None, config(2)) as runtime:
        assert "scale-out: ucx" in runtime.describe()
        round_trip(runtime, salt=1)

    def does_not_fit(env: Any) -> Any:
        raise TypeError("3000000000 does not fit")

    if rank == 1:
        cpu_executor.transport_options = does_not_fit
    begin = time.monotonic()
    with pytest.raises(commlib.CommError, match=r"^rank 1: TypeError: 3000000000 does not fit"):
        commlib.Runtime(None, config(2))
    assert time.monotonic() - begin < 30  # of the 60 s that a rank waits for one that does not come


def test_ranks_agree_on_the_transport_and_on_what_does_not_fit() -> None:
    check_ranks(f"{HERE}:unequal_rank", 2, ranks_per_node=1, env={"COMMLIB_TRANSPORT": "auto"})


def test_a_call_that_the_core_does_not_take_keeps_no_arrays() -> None:
    import commlib

    with commlib.Runtime(None, config(1)) as runtime:
        x, idx = np.ones((3, HIDDEN), dtype=np.float32), np.zeros((3, 2), dtype=np.int64)
        idx[:, 1] = 1
        engine = mock.Mock(dispatch=mock.Mock(side_effect=commlib.ConfigError("belongs to another process")))
        with (
            mock.patch.object(runtime._executor, "_engine", engine),
            pytest.raises(commlib.ConfigError, match="another process"),
        ):
            runtime.dispatch(x, idx)
        assert runtime._executor._in_flight == []  # type: ignore[attr-defined]
        assert runtime.dispatch(x, idx).handle.num_tokens == 3
