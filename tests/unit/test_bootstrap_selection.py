"""Which bootstrap connect() takes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from commlib.bootstrap import Bootstrap, connect
from commlib.bootstrap.selection import choose, torchrun_port
from commlib.bootstrap.single import SingleBootstrap
from commlib.env import Env
from commlib.errors import CommError, ConfigError

PMI = {"PMI_RANK": "1", "PMI_SIZE": "4"}
OMPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
MEETING = {"rendezvous": "tcp://node3:4000", "job_token": "secret"}


def pick(env: dict[str, Any], environ: dict[str, str], *, mpi4py: bool = True, torch: bool = False) -> Any:
    return choose(Env(**env), environ, has_mpi4py=mpi4py, has_torch_group=torch)


@pytest.mark.parametrize(
    ("kind", "env", "environ", "flags"),
    [
        ("single", {}, {}, {}),
        ("single", {}, {"RANK": "0", "WORLD_SIZE": "2"}, {}),
        ("mpi", {}, PMI, {}),
        ("mpi", {}, OMPI, {}),
        ("mpi", {}, {"PMIX_RANK": "0"}, {}),
        ("mpi", {}, {**PMI, **TORCHRUN}, {"torch": True}),
        ("torch", {}, TORCHRUN, {"torch": True}),
        ("torch", {}, {}, {"torch": True}),
        ("zmq", {}, TORCHRUN, {}),
        ("zmq", {**MEETING, "rank": 1, "world_size": 2}, PMI, {"torch": True}),
        ("zmq", {**MEETING}, PMI, {"mpi4py": False}),
        ("mpi", {**MEETING, "bootstrap": "mpi"}, {}, {}),
        ("torch", {"bootstrap": "torch"}, PMI, {"torch": True}),
        ("zmq", {**MEETING, "bootstrap": "zmq"}, PMI, {}),
    ],
)
def test_choice_of_provider(kind: str, env: dict[str, Any], environ: dict[str, str], flags: dict[str, bool]) -> None:
    assert pick(env, environ, **flags).kind == kind


def test_rank_and_size_come_from_commlib_variables_before_the_launcher() -> None:
    from_launcher = pick(MEETING, OMPI, mpi4py=False)
    assert (from_launcher.rank, from_launcher.size, from_launcher.endpoint) == (2, 3, "tcp://node3:4000")
    explicit = pick({**MEETING, "rank": 5, "world_size": 6}, OMPI)
    assert (explicit.rank, explicit.size, explicit.token) == (5, 6, "secret")
    assert "secret" not in repr(explicit)


def test_torchrun_without_a_group_meets_at_a_port_of_its_own() -> None:
    choice = pick({}, TORCHRUN)
    assert (choice.rank, choice.size) == (1, 2)
    assert choice.endpoint == f"tcp://node7:{torchrun_port(TORCHRUN)}"
    ports = {torchrun_port({**TORCHRUN, "MASTER_PORT": str(port)}) for port in range(29000, 29100)}
    assert len(ports) > 90 and all(20000 <= port <= 32000 for port in ports)
    for master_port in range(20000, 32000):
        assert torchrun_port({"MASTER_PORT": str(master_port)}) != master_port
    other = {name: pick({}, {**TORCHRUN, name: "7"}).token for name in ("TORCHELASTIC_RUN_ID", "MASTER_PORT")}
    restarted = pick({}, {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"})
    assert len({choice.token, restarted.token, *other.values()}) == 4
    assert restarted.endpoint == choice.endpoint
    assert pick({"job_token": "mine"}, TORCHRUN).token == "mine"
    assert pick(MEETING, TORCHRUN).endpoint == "tcp://node3:4000"
    assert pick({}, {**TORCHRUN, "MASTER_ADDR": "fd00::1"}).endpoint.startswith("tcp://[fd00::1]:")


@pytest.mark.parametrize(
    ("env", "environ", "flags", "message"),
    [
        (
            {"rendezvous": "tcp://h:1", "rank": 0, "world_size": 2},
            {},
            {},
            "rendezvous: set COMMLIB_JOB_TOKEN .*token_hex",
        ),
        ({"rendezvous": "tcp://h:1"}, TORCHRUN, {}, "rendezvous: set COMMLIB_JOB_TOKEN .*token_hex"),
        (MEETING, {}, {}, "rendezvous: set COMMLIB_RANK and COMMLIB_WORLD_SIZE .*them[)]$"),
        ({"rank": 0, "world_size": 2}, {}, {}, "set COMMLIB_RENDEZVOUS=tcp://host:port"),
        ({"rank": 0, "world_size": 2}, PMI, {}, "set COMMLIB_RENDEZVOUS=tcp://host:port"),
        ({"world_size": 2}, {}, {}, "COMMLIB_RANK.*; set COMMLIB_RENDEZVOUS.*; set COMMLIB_JOB_TOKEN"),
        ({**MEETING, "world_size": 2}, OMPI, {}, "rank 2 is not below the world size 2"),
        ({}, PMI, {"mpi4py": False}, "mpi4py is not installed.*COMMLIB_RENDEZVOUS.*COMMLIB_JOB_TOKEN"),
        ({"bootstrap": "mpi"}, {}, {"mpi4py": False}, "COMMLIB_BOOTSTRAP=mpi needs mpi4py"),
        ({"bootstrap": "torch"}, TORCHRUN, {}, "init_process_group"),
        ({"bootstrap": "zmq"}, {}, {}, "set COMMLIB_RANK.*; set COMMLIB_RENDEZVOUS.*; set COMMLIB_JOB_TOKEN"),
        ({}, {**PMI, "PMI_RANK": "one"}, {}, "PMI_RANK='one' is not an integer"),
    ],
)
def test_incomplete_environment_says_what_to_set(
    env: dict[str, Any], environ: dict[str, str], flags: dict[str, bool], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pick(env, environ, **flags)


def test_connect_without_a_launcher_is_a_single_rank() -> None:
    bootstrap = connect(env=Env())
    assert isinstance(bootstrap, Bootstrap) and isinstance(bootstrap, SingleBootstrap)
    assert (bootstrap.rank, bootstrap.size) == (0, 1)
    assert bootstrap.allgather(b"me", timeout_s=1) == [b"me"]
    bootstrap.barrier(1)
    bootstrap.close()
    with pytest.raises(CommError, match="closed"):
        bootstrap.allgather(b"", timeout_s=1)


@pytest.mark.parametrize("group", ["world", 3, object()])
def test_connect_refuses_what_is_no_group(group: object) -> None:
    with pytest.raises(ConfigError, match=f"{type(group).__name__} is no group: pass an mpi4py"):
        connect(group)


def test_nothing_heavy_is_imported_until_a_provider_needs_it() -> None:
    code = (
        "import sys; from commlib.bootstrap import connect; from commlib.env import Env; connect(env=Env())\n"
        "try: connect(object())\n"
        "except ValueError: pass\n"
        "sys.exit(str(sorted({'torch', 'mpi4py', 'mpi4py.MPI', 'zmq'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr.strip() == "[]"
