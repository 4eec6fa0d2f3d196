"""Bootstraps under the real launchers, and the process spawner itself. Functions named *_rank run on every rank."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest

from commlib.bootstrap import Bootstrap, connect
from commlib.errors import CommError, CommTimeout, ConfigError
from commlib.testing.spawn import RankResult, check_ranks, run_ranks

pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem


def exchange(bootstrap: Bootstrap, salt: str = "") -> None:
    """Payloads of unlike lengths (rank 0: none, rank 1: 1 MB) arrive complete and in rank order."""
    payloads = [
        (f"{salt}{rank}".encode() * (1 << 19 if rank == 1 else 3)) * (rank > 0) for rank in range(bootstrap.size)
    ]
    for _ in range(2):
        assert bootstrap.allgather(payloads[bootstrap.rank], timeout_s=20) == payloads
    bootstrap.barrier(20)


def report(**values: object) -> None:
    print(json.dumps(values), flush=True)


def reports(results: list[RankResult]) -> list[list[dict[str, object]]]:
    return [[json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")] for result in results]


# --- plain processes --------------------------------------------------------------------------------------------


def plain_rank() -> None:
    for salt in ("first", "second"):
        bootstrap = connect(timeout_s=20)
        exchange(bootstrap, salt)
        bootstrap.close()
    report(rank=bootstrap.rank, size=bootstrap.size, modules=sorted({"torch", "mpi4py"} & set(sys.modules)))


def test_plain_processes_meet_twice_and_may_exit_at_once() -> None:
    results = reports(check_ranks(f"{HERE}:plain_rank", 4, timeout_s=40))
    assert results == [[{"rank": rank, "size": 4, "modules": []}] for rank in range(4)]


# --- mpirun -----------------------------------------------------------------------------------------------------


def mpi_rank() -> None:
    bootstrap = connect(timeout_s=20)
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    # The caller's own message, sent before and received after ours, under every wildcard.
    request = world.Isend([b"mine", MPI.BYTE], dest=(world.rank + 1) % world.size, tag=7)
    exchange(bootstrap)
    inbox = bytearray(4)
    world.Recv([inbox, MPI.BYTE], source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)
    request.Wait()
    assert inbox == b"mine" and not world.Iprobe(source=MPI.ANY_SOURCE, tag=MPI.ANY_TAG)

    # Ranks 2, 0 as one communicator in that order, 3, 1 as the other.
    half = world.Split(color=world.rank % 2, key=-world.rank)
    part = connect(half, timeout_s=20)
    assert part.size == 2 and part.rank == (0 if world.rank >= 2 else 1)
    exchange(part, salt=f"color {world.rank % 2}")
    assert "MPI" in part.describe()

    with pytest.raises(ConfigError, match="COMM_NULL"):
        connect(MPI.COMM_NULL)
    part.close()
    bootstrap.close()
    bootstrap.close()
    with pytest.raises(CommError, match="closed"):
        bootstrap.barrier(1)
    report(rank=bootstrap.rank, size=bootstrap.size, world=world.rank)


def test_mpirun_uses_a_duplicate_of_the_world_and_of_a_part_of_it() -> None:
    results = reports(check_ranks(f"{HERE}:mpi_rank", 4, launcher="mpirun", timeout_s=40))
    assert results == [[{"rank": rank, "size": 4, "world": rank}] for rank in range(4)]


def mpi_missing_rank() -> None:
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    late = connect(timeout_s=20)  # everybody is in time here
    if rank == 2:
        time.sleep(3)
        return
    if rank == 0:
        time.sleep(0.4)  # the others' deadlines come first
    errors = []
    for call in (lambda: late.allgather(b"x", timeout_s=0.6), lambda: connect(timeout_s=0.6)):
        start = time.monotonic()
        with pytest.raises(CommTimeout) as caught:
            call()
        assert caught.value.peer == 2 and caught.value.rank == rank
        errors.append(str(caught.value))
        assert time.monotonic() - start < 2.5
    with pytest.raises(CommError, match="failed before: MPI: rank 2 of 3"):
        late.barrier(1)
    late.close()
    report(errors=errors)


def test_mpirun_names_the_rank_that_does_not_come() -> None:
    results = reports(check_ranks(f"{HERE}:mpi_missing_rank", 3, launcher="mpirun", timeout_s=40))
    message = "MPI: rank 2 of 3 did not arrive within 0.6 s"
    assert results == [[{"errors": [message] * 2}], [{"errors": [message] * 2}], []]


def mpi_rank_zero_is_late_rank() -> None:
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 0:
        time.sleep(2)
        return
    with pytest.raises(CommTimeout, match=r"^MPI: rank 0 of 2 did not answer within 0\.5 s$") as caught:
        connect(timeout_s=0.5)
    assert caught.value.peer == 0
    report(done=True)


def test_mpirun_names_rank_zero_too() -> None:
    results = check_ranks(f"{HERE}:mpi_rank_zero_is_late_rank", 2, launcher="mpirun", timeout_s=40)
    assert reports(results) == [[], [{"done": True}]]


# --- torchrun ---------------------------------------------------------------------------------------------------


def torch_rank() -> None:
    # Before init_process_group: ZeroMQ at MASTER_ADDR, and torch need not even be there.
    early = connect(timeout_s=60)
    assert "ZeroMQ" in early.describe() and "torch" not in sys.modules
    exchange(early)

    import torch.distributed as dist

    dist.init_process_group("gloo")
    world = connect(timeout_s=30)
    assert "torch process group" in world.describe()
    assert (world.rank, world.size) == (early.rank, early.size) == (dist.get_rank(), 4)
    exchange(world)
    exchange_in_parts(world.rank)
    torch_missing(world.rank)
    early.close()
    world.close()
    report(rank=world.rank)
    dist.barrier()
    dist.destroy_process_group()


def exchange_in_parts(rank: int) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from commlib.bootstrap import torch_group

    odd = dist.new_group([1, 3])
    if rank % 2:
        part = connect(odd, timeout_s=30)
        assert (part.rank, part.size) == (rank // 2, 2)
        exchange(part)
    else:
        with pytest.raises(ConfigError, match="not a member of the torch process group"):
            connect(odd)

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    with pytest.raises(ConfigError, match=r"2 dimensions \('dp', 'ep'\).*mesh\['ep'\]"):
        connect(mesh)
    for name, place in (("ep", rank % 2), ("dp", rank // 2)):
        along = connect(mesh[name], timeout_s=30)
        assert (along.rank, along.size) == (place, 2)
        # Both pairs of the dimension talk at once, with payloads of their own.
        exchange(along, salt=f"{name}{rank - place * (1 if name == 'ep' else 2)}")

    torch_group._group_store = lambda group: None  # what a group without a store gets
    plain = connect(timeout_s=30)
    exchange(plain)


def torch_missing(rank: int) -> None:
    """Rank 2 stays away: with a store all name it, without one rank 0 does."""
    import torch.distributed as dist

    from commlib.bootstrap import torch_group

    group = dist.new_group([0, 1, 2])
    blind = dist.new_group([0, 1, 2])
    if rank in (0, 1):
        torch_group._group_store = lambda group: group.get_group_store()
        with pytest.raises(CommTimeout, match=r"^torch group: rank 2 of 3 did not arrive within 0\.5 s$") as caught:
            connect(group, timeout_s=0.5)
        assert (caught.value.rank, caught.value.peer, caught.value.seen) == (rank, 2, 2)
        torch_group._group_store = lambda group: None
        with pytest.raises(CommTimeout, match="2" if rank == 0 else "not all of 3 ranks arrived") as caught:
            connect(blind, timeout_s=0.5)
        report(blind=str(caught.value))


def test_torchrun_with_and_without_a_group() -> None:
    results = check_ranks(f"{HERE}:torch_rank", 4, launcher="torchrun", timeout_s=100)
    assert [ranks[-1] for ranks in reports(results)] == [{"rank": rank} for rank in range(4)]
    assert re.search(r"[Rr]anks? 2\b", str(reports(results)[0][0]["blind"]))


# --- the spawner ------------------------------------------------------------------------------------------------


def failing_rank(folder: str) -> None:
    rank = int(os.environ["COMMLIB_RANK"])
    print(f"rank {rank} says hello", flush=True)
    assert os.environ["COMMLIB_RANKS_PER_NODE"] == "2" and os.environ["COMMLIB_LOG"] == "error"
    if folder:
        child = os.fork()
        if child == 0:
            time.sleep(60)
        Path(folder, str(rank)).write_text(f"{os.getpid()} {child}")
        time.sleep(60)
    if rank == 1:
        raise RuntimeError("rank one is unhappy")
    if rank == 2:
        sys.exit(7)


def test_return_codes_and_tracebacks_come_back() -> None:
    results = run_ranks(f"{HERE}:failing_rank", 3, args=[""], ranks_per_node=2, env={"COMMLIB_LOG": "error"})
    assert [result.returncode for result in results] == [0, 1, 7]
    assert [result.stdout for result in results] == [f"rank {rank} says hello\n" for rank in range(3)]
    assert "RuntimeError: rank one is unhappy" in results[1].stderr
    with pytest.raises(AssertionError, match=r"1 of 2 ranks failed\n--- rank 1(.|\n)*rank one is unhappy"):
        check_ranks(f"{HERE}:failing_rank", 2, args=[""], ranks_per_node=2, env={"COMMLIB_LOG": "error"})


@pytest.mark.parametrize("launcher", ["processes", "mpirun"])
def test_timeout_kills_everything_and_shows_the_last_output(launcher: str, tmp_path: Path) -> None:
    env = {"COMMLIB_LOG": "error", **({"COMMLIB_RANK": "0"} if launcher == "mpirun" else {})}
    count = 1 if launcher == "mpirun" else 2
    with pytest.raises(AssertionError, match=r"not done after 2\.5 s\n(.|\n)*rank 0 says hello"):
        run_ranks(
            f"{HERE}:failing_rank",
            count,
            args=[str(tmp_path)],
            ranks_per_node=2,
            env=env,
            timeout_s=2.5,
            launcher=launcher,
        )
    pids = [int(pid) for path in tmp_path.iterdir() for pid in path.read_text().split()]
    assert len(pids) == 2 * count
    end = time.monotonic() + 3
    while any(is_running(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert [pid for pid in pids if is_running(pid)] == []


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat[stat.rindex(")") + 2] != "Z"  # nobody may have reaped it yet


def test_script_as_target(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import sys\nfrom commlib.bootstrap import connect\n"
        "b = connect(timeout_s=20)\nprint(b.rank, sys.argv[1:], __name__)\nb.barrier(20)\nb.close()\n"
    )
    results = check_ranks(str(script), 2, args=["--flag", 3], timeout_s=40)
    assert [result.stdout for result in results] == [f"{rank} ['--flag', '3'] __main__\n" for rank in range(2)]
