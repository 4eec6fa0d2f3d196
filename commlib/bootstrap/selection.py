"""Which bootstrap a process uses when the caller passes no group: a pure function of the environment.

=====  =======================================================  ==========================================
order  what is found                                            bootstrap
=====  =======================================================  ==========================================
1      COMMLIB_BOOTSTRAP other than auto                        that one
2      COMMLIB_RENDEZVOUS, COMMLIB_RANK or COMMLIB_WORLD_SIZE   ZeroMQ; see below
3      mpirun (PMI_RANK, OMPI_COMM_WORLD_RANK, PMIX_RANK)       MPI.COMM_WORLD
4      torch.distributed is initialised                         its default group
5      torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)    ZeroMQ at MASTER_ADDR, see `torchrun_port`
6      none of these                                            single rank
=====  =======================================================  ==========================================

A ZeroMQ rendezvous takes rank and size from COMMLIB_RANK and COMMLIB_WORLD_SIZE, or else from mpirun or torchrun. An
explicit address needs COMMLIB_JOB_TOKEN.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from commlib.env import Env
from commlib.errors import ConfigError

__all__ = ["TOKEN_HINT", "Choice", "choose", "torchrun_port"]

TOKEN_HINT = (
    "set COMMLIB_JOB_TOKEN to one secret on all ranks, for example to the output of: "
    "python -c 'import secrets; print(secrets.token_hex(16))'"
)

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MPIRUN = (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMIX_RANK", "PMIX_SIZE"))

# Below the ephemeral range of Linux (32768..60999), so that no client socket can sit on the port by chance.
_FIRST_PORT = 20000
_NUM_PORTS = 12000


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A provider and what it needs to know; `rank` to `token` only for ``zmq``."""

    kind: Literal["mpi", "torch", "zmq", "single"]
    rank: int = 0
    size: int = 1
    endpoint: str = ""
    token: str = field(default="", repr=False)


class _Launched(NamedTuple):
    by: Literal["mpirun", "torchrun"]
    rank: int
    size: int | None


def choose(env: Env, environ: Mapping[str, str], *, has_mpi4py: bool, has_torch_group: bool) -> Choice:
    """Follows the table above.

    Args:
        env: the COMMLIB_* variables.
        environ: the environment, for the variables of launchers.
        has_mpi4py: mpi4py can be imported.
        has_torch_group: torch.distributed is initialised.

    Raises:
        ConfigError: what was asked for cannot be had, or is incomplete; says what to set.
    """
    launched = _find_launcher(environ)
    if env.bootstrap == "zmq" or (env.bootstrap == "auto" and _asks_for_rendezvous(env)):
        return _choose_rendezvous(env, environ, launched)
    if env.bootstrap == "mpi" or (env.bootstrap == "auto" and launched is not None and launched.by == "mpirun"):
        if has_mpi4py:
            return Choice(kind="mpi")
        if env.bootstrap == "mpi":
            raise ConfigError("COMMLIB_BOOTSTRAP=mpi needs mpi4py, which is not installed")
        raise ConfigError(
            "started by mpirun, but mpi4py is not installed: install it, or set COMMLIB_RENDEZVOUS=tcp://host:port "
            f"(an address of rank 0's machine) and {TOKEN_HINT}"
        )
    if env.bootstrap == "torch" or has_torch_group:
        if not has_torch_group:
            raise ConfigError("COMMLIB_BOOTSTRAP=torch needs torch.distributed.init_process_group to be called before")
        return Choice(kind="torch")
    if launched is not None:
        return _choose_rendezvous(env, environ, launched)
    return Choice(kind="single")


def torchrun_port(environ: Mapping[str, str]) -> int:
    """The port of the rendezvous under torchrun, in 20000..31999: a hash of MASTER_PORT and the run id.

    MASTER_PORT itself is torch's store, and its neighbours are what the next job on the machine tends to be given.
    COMMLIB_RENDEZVOUS overrides the port, if it is taken all the same.
    """
    text = f"{environ['MASTER_PORT']}/{environ.get('TORCHELASTIC_RUN_ID', '')}"
    port = _FIRST_PORT + int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % _NUM_PORTS
    return port + 1 if str(port) == environ["MASTER_PORT"] else port


def _asks_for_rendezvous(env: Env) -> bool:
    return env.rendezvous is not None or env.rank is not None or env.world_size is not None


def _choose_rendezvous(env: Env, environ: Mapping[str, str], launched: _Launched | None) -> Choice:
    rank = env.rank if env.rank is not None else launched.rank if launched else None
    size = env.world_size if env.world_size is not None else launched.size if launched else None
    # An explicit rendezvous may be reachable by anybody, so its token has to be explicit as well.
    has_address = env.rendezvous is None and launched is not None and launched.by == "torchrun"
    token = env.job_token or (_torchrun_token(environ) if has_address else None)
    missing = []
    if rank is None or size is None:
        missing.append("set COMMLIB_RANK and COMMLIB_WORLD_SIZE (or let mpirun or torchrun tell them)")
    if env.rendezvous is None and not has_address:
        missing.append("set COMMLIB_RENDEZVOUS=tcp://host:port, an address of rank 0's machine, on all ranks")
    if token is None:
        missing.append(TOKEN_HINT)
    if rank is None or size is None or token is None or missing:
        raise ConfigError(f"too little is known for a rendezvous: {'; '.join(missing)}")
    if rank >= size:
        raise ConfigError(f"rank {rank} is not below the world size {size}")
    endpoint = env.rendezvous or _torchrun_endpoint(environ)
    return Choice(kind="zmq", rank=rank, size=size, endpoint=endpoint, token=token)


def _torchrun_endpoint(environ: Mapping[str, str]) -> str:
    host = environ["MASTER_ADDR"]
    return f"tcp://[{host}]:{torchrun_port(environ)}" if ":" in host else f"tcp://{host}:{torchrun_port(environ)}"


def _torchrun_token(environ: Mapping[str, str]) -> str:
    """Tells this job, and this attempt of it, from others. No secret: it keeps strays out, not attackers."""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    return hashlib.sha256("/".join(environ.get(name, "") for name in names).encode()).hexdigest()


def _find_launcher(environ: Mapping[str, str]) -> _Launched | None:
    for rank_name, size_name in _MPIRUN:
        if rank_name in environ:
            size = _integer(environ, size_name) if size_name in environ else None
            return _Launched("mpirun", _integer(environ, rank_name), size)
    if all(name in environ for name in _TORCHRUN):
        return _Launched("torchrun", _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE"))
    return None


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(f"{name}={environ[name]!r} is not an integer") from None
