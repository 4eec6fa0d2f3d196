"""Starts the ranks of a test as processes of this machine: plainly, under mpirun, or under torchrun.

>>> for result in check_ranks("my_tests:echo_rank", 4):        # doctest: +SKIP
...     print(result.rank, result.stdout)

A rank is ``python -m commlib.testing.spawn --rank-main target args``. Whatever happens, no process outlives the call.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import random
import runpy
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import commlib

__all__ = ["RankResult", "check_ranks", "free_port", "run_ranks"]

Launcher = Literal["processes", "mpirun", "torchrun"]

_POLL_S = 0.02
_MAX_SHOWN_CHARS = 4000
_RANK_VARIABLES = ("COMMLIB_RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "RANK")
# What would tell a rank that it belongs to the job that the test itself runs in.
_FOREIGN_PREFIXES = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_", "TORCHELASTIC_", "MASTER_", "MPI_LOCAL")
_FOREIGN_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME")
_OWN_NAMES = ("BOOTSTRAP", "JOB_TOKEN", "PLANS", "RANK", "RANKS_PER_NODE", "RENDEZVOUS", "WORLD_SIZE")


class RankResult(NamedTuple):
    """How one rank ended; `returncode` is negative if a signal killed it."""

    rank: int
    returncode: int
    stdout: str
    stderr: str


class _Process(NamedTuple):
    name: str  # of its output files
    popen: subprocess.Popen[bytes]


def run_ranks(
    target: str,
    num_ranks: int,
    *,
    args: Sequence[Any] = (),
    ranks_per_node: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120.0,
    launcher: Launcher = "processes",
    mpirun_args: Sequence[str] = (),
) -> list[RankResult]:
    """Runs a target on every rank and waits for all of them.

    Args:
        target: ``"module:function"``, called with `args`; modules are looked up in the repository, its tests and the
            caller's path. Or the path of a script, run with `args` as its command line.
        num_ranks: number of ranks, at least 1.
        args: values that JSON can carry.
        ranks_per_node: sets COMMLIB_RANKS_PER_NODE.
        env: variables to set on all ranks, over everything else.
        timeout_s: seconds after which all ranks are killed.
        launcher: ``processes`` gives the ranks a private rendezvous and token on loopback; ``mpirun`` and ``torchrun``
            set what those commands set.
        mpirun_args: further options of mpirun.

    Returns:
        One result per rank, in rank order, whatever their return codes.

    Raises:
        AssertionError: the time was up; shows the last output of every rank.
    """
    with tempfile.TemporaryDirectory(prefix="commlib-ranks-") as folder:
        logs = Path(folder)
        environ = _rank_environ(ranks_per_node, launcher, num_ranks)
        main = ["-m", "commlib.testing.spawn", "--rank-main", target, json.dumps(list(args))]
        if launcher == "processes":
            commands = {f"rank-{rank}": [sys.executable, *main] for rank in range(num_ranks)}
        else:
            main += ["--log-dir", folder]
            commands = {"launcher": _launch_command(launcher, num_ranks, mpirun_args, main)}
        processes = []
        try:
            for rank, (name, command) in enumerate(commands.items()):
                own = {"COMMLIB_RANK": str(rank)} if launcher == "processes" else {}
                processes.append(_start(name, command, logs, {**environ, **own, **(env or {})}))
            is_in_time = _wait(processes, timeout_s)
        finally:
            for process in processes:
                _kill(process.popen)
        results = [_result(rank, logs, processes) for rank in range(num_ranks)]
        if not is_in_time:
            raise AssertionError(f"{target}: not done after {timeout_s:g} s\n{_show(results)}")
        return results


def check_ranks(
    target: str,
    num_ranks: int,
    *,
    args: Sequence[Any] = (),
    ranks_per_node: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120.0,
    launcher: Launcher = "processes",
    mpirun_args: Sequence[str] = (),
) -> list[RankResult]:
    """Like `run_ranks`, and raises `AssertionError` with all tracebacks unless every return code is 0."""
    results = run_ranks(
        target,
        num_ranks,
        args=args,
        ranks_per_node=ranks_per_node,
        env=env,
        timeout_s=timeout_s,
        launcher=launcher,
        mpirun_args=mpirun_args,
    )
    failed = [result for result in results if result.returncode != 0]
    if failed:
        raise AssertionError(f"{target}: {len(failed)} of {num_ranks} ranks failed\n{_show(failed)}")
    return results


def free_port() -> int:
    """A TCP port of loopback that nobody listens on at the moment.

    From below the range that the system hands out by itself: otherwise any connection made before the caller listens
    may get the same one.
    """
    while True:
        port = random.randrange(10000, 32000)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            return port


def _rank_environ(ranks_per_node: int | None, launcher: Launcher, num_ranks: int) -> dict[str, str]:
    foreign = {*_FOREIGN_NAMES, *(f"COMMLIB_{name}" for name in _OWN_NAMES)}
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in foreign and not name.startswith(_FOREIGN_PREFIXES)
    }
    root = Path(commlib.__file__).resolve().parent.parent
    # The interpreter finds its own libraries; what remains is what the caller, for example pytest, has added.
    added = [path for path in sys.path if path and not path.startswith((sys.prefix, sys.base_prefix))]
    paths = [str(root), str(root / "tests"), *added, os.environ.get("PYTHONPATH", "")]
    environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores
    environ["COMMLIB_PLANS"] = "off"  # whatever has been tuned on this machine
    if ranks_per_node is not None:
        environ["COMMLIB_RANKS_PER_NODE"] = str(ranks_per_node)
    if launcher == "processes":
        environ["COMMLIB_RENDEZVOUS"] = f"tcp://127.0.0.1:{free_port()}"
        environ["COMMLIB_JOB_TOKEN"] = secrets.token_hex(16)
        environ["COMMLIB_WORLD_SIZE"] = str(num_ranks)
    return environ


def _launch_command(launcher: Launcher, num_ranks: int, mpirun_args: Sequence[str], main: list[str]) -> list[str]:
    if launcher == "mpirun":
        beside = Path(sys.executable).parent / "mpirun"
        # MPIRUN chooses another MPI than that of the environment (launch/mpirun honours it, too).
        mpirun = os.environ.get("MPIRUN") or (str(beside) if beside.exists() else shutil.which("mpirun"))
        if mpirun is None:
            raise FileNotFoundError("mpirun is neither beside the Python interpreter nor in PATH")
        return [mpirun, *mpirun_args, "-n", str(num_ranks), sys.executable, *main]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), *address, *main]


def _start(name: str, command: list[str], logs: Path, environ: dict[str, str]) -> _Process:
    with open(logs / f"{name}.out", "wb") as stdout, open(logs / f"{name}.err", "wb") as stderr:
        popen = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    return _Process(name, popen)


def _wait(processes: Sequence[_Process], timeout_s: float) -> bool:
    """Whether all processes ended within the time."""
    end = time.monotonic() + timeout_s
    while any(process.popen.poll() is None for process in processes):
        if time.monotonic() >= end:
            return False
        time.sleep(_POLL_S)
    return True


def _kill(popen: subprocess.Popen[bytes]) -> None:
    """Kills a process that still runs, its group, and what it started: launchers give ranks groups of their own."""
    if popen.poll() is not None:
        return
    family = _descendants(popen.pid)
    os.killpg(popen.pid, signal.SIGKILL)
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    popen.wait()


def _descendants(ancestor: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue  # it has just ended
        # "pid (name) state ppid ...": the name may hold spaces and parentheses.
        parent = int(text[text.rindex(")") + 2 :].split()[1])
        children.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    generation = [ancestor]
    while generation:
        generation = [child for pid in generation for child in children.get(pid, [])]
        found += generation
    return found


def _result(rank: int, logs: Path, processes: Sequence[_Process]) -> RankResult:
    def read(name: str) -> str:
        path = logs / name
        return path.read_text(errors="replace") if path.exists() else ""

    stdout, stderr = read(f"rank-{rank}.out"), read(f"rank-{rank}.err")
    own = next((process for process in processes if process.name == f"rank-{rank}"), None)
    if own is not None:
        return RankResult(rank, own.popen.returncode, stdout, stderr)
    if recorded := read(f"rank-{rank}.code"):
        return RankResult(rank, int(recorded), stdout, stderr)
    # Killed, or never started: the launcher may know more.
    returncode = processes[0].popen.returncode or -signal.SIGKILL
    return RankResult(rank, returncode, stdout + read("launcher.out"), stderr + read("launcher.err"))


def _show(results: Sequence[RankResult]) -> str:
    parts = []
    for rank, returncode, stdout, stderr in results:
        parts.append(f"--- rank {rank}, return code {returncode}")
        parts += [text[-_MAX_SHOWN_CHARS:].rstrip() for text in (stdout, stderr) if text.strip()]
    return "\n".join(parts)


def _run_target(target: str, args: list[Any]) -> None:
    if target.endswith(".py"):
        sys.argv = [target, *map(str, args)]
        sys.path.insert(0, str(Path(target).resolve().parent))
        runpy.run_path(target, run_name="__main__")
        return
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)(*args)


def _rank_main(target: str, args: list[Any], logs: Path | None) -> int:
    rank = next((os.environ[name] for name in _RANK_VARIABLES if name in os.environ), "0")
    if logs is not None:
        # Launchers mix the ranks' output; a file each, from the file descriptors on, keeps native messages apart too.
        for stream, suffix in ((sys.stdout, "out"), (sys.stderr, "err")):
            with open(logs / f"rank-{rank}.{suffix}", "wb") as file:
                os.dup2(file.fileno(), stream.fileno())
    code = 0
    try:
        _run_target(target, args)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if logs is not None:
        (logs / f"rank-{rank}.code").write_text(str(code))
    if code and "mpi4py.MPI" in sys.modules:
        # Leaving in order would wait in MPI_Finalize for ranks that may never come.
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(code)
    return code


def _main() -> int:
    parser = argparse.ArgumentParser(description="One rank of run_ranks().")
    parser.add_argument("--rank-main", nargs=2, metavar=("TARGET", "JSON"), required=True)
    parser.add_argument("--log-dir", type=Path)
    options = parser.parse_args()
    target, args = options.rank_main
    return _rank_main(target, json.loads(args), options.log_dir)


if __name__ == "__main__":
    sys.exit(_main())
