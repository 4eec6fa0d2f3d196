"""How the ranks of a job find each other: MPI, torch.distributed, or a ZeroMQ rendezvous.

A bootstrap carries a few messages when a Runtime is built, grown or closed; the token path never uses it. MPI, ZeroMQ
and torch are imported only by the provider that needs them.
"""

from __future__ import annotations

import importlib.util
import logging
import sys

from commlib.bootstrap.interface import MAX_PAYLOAD_BYTES, Bootstrap
from commlib.bootstrap.selection import choose
from commlib.bootstrap.single import SingleBootstrap
from commlib.env import Env, launcher_environment, read_env
from commlib.errors import ConfigError

__all__ = ["MAX_PAYLOAD_BYTES", "Bootstrap", "connect"]

logger = logging.getLogger("commlib.bootstrap")


def connect(group: object | None = None, *, env: Env | None = None, timeout_s: float = 60.0) -> Bootstrap:
    """Meets the other ranks of the job. A collective: all of them call it, in the same order if several times.

    Args:
        group: an mpi4py intracommunicator, a torch ProcessGroup, a 1-D torch DeviceMesh (``mesh["ep"]``), or a
            Bootstrap, which is returned as it is. Ranks are those of the group. None: as the environment says, see
            `selection`.
        env: the COMMLIB_* variables; None reads them.
        timeout_s: seconds within which all ranks must have come.

    Raises:
        CommTimeout: names the ranks that did not come in time.
        ConfigError: the group or the environment cannot be used; says what to set.
    """
    env = env or read_env()
    if env.log is not None:
        _log_at(env.log)
    bootstrap = _connect_by_environment(env, timeout_s) if group is None else _adopt(group, timeout_s)
    logger.info("bootstrap: %s", bootstrap.describe())
    return bootstrap


def _log_at(level: str) -> None:
    """For all loggers of commlib; on stderr if the program has set up nothing else."""
    package = logging.getLogger("commlib")
    package.setLevel(level.upper())
    if not package.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        package.addHandler(handler)


def _connect_by_environment(env: Env, timeout_s: float) -> Bootstrap:
    has_mpi4py = importlib.util.find_spec("mpi4py") is not None
    choice = choose(env, launcher_environment(), has_mpi4py=has_mpi4py, has_torch_group=_has_torch_group())
    if choice.kind == "mpi":
        from mpi4py import MPI

        from commlib.bootstrap.mpi import MpiBootstrap

        return MpiBootstrap(MPI.COMM_WORLD, timeout_s=timeout_s)
    if choice.kind == "torch":
        import torch.distributed as dist

        from commlib.bootstrap.torch_group import TorchBootstrap

        default_group = dist.group.WORLD
        assert default_group is not None, "torch.distributed says that it is initialised"
        return TorchBootstrap(default_group, timeout_s=timeout_s)
    if choice.kind == "zmq":
        from commlib.bootstrap.rendezvous import RendezvousBootstrap

        return RendezvousBootstrap(
            endpoint=choice.endpoint, token=choice.token, rank=choice.rank, size=choice.size, timeout_s=timeout_s
        )
    return SingleBootstrap()


def _adopt(group: object, timeout_s: float) -> Bootstrap:
    # An object of a library can only exist if the library has been imported, so nothing is imported to find out.
    if _is_instance(group, "mpi4py.MPI", "Comm"):
        from mpi4py import MPI

        from commlib.bootstrap.mpi import MpiBootstrap

        assert isinstance(group, MPI.Comm)
        return MpiBootstrap(group, timeout_s=timeout_s)
    is_torch_group = _is_instance(group, "torch.distributed", "ProcessGroup")
    if is_torch_group or _is_instance(group, "torch.distributed.device_mesh", "DeviceMesh"):
        from torch.distributed import ProcessGroup
        from torch.distributed.device_mesh import DeviceMesh

        from commlib.bootstrap.torch_group import TorchBootstrap

        assert isinstance(group, ProcessGroup | DeviceMesh)
        return TorchBootstrap(group, timeout_s=timeout_s)
    if isinstance(group, Bootstrap):
        return group
    non_member = getattr(getattr(sys.modules.get("torch.distributed"), "GroupMember", None), "NON_GROUP_MEMBER", None)
    if non_member is not None and group is non_member:
        raise ConfigError("this process is not a member of the torch process group")
    raise ConfigError(
        f"{type(group).__name__} is no group: pass an mpi4py intracommunicator, a torch ProcessGroup, a 1-D "
        "DeviceMesh, a Bootstrap, or None"
    )


def _is_instance(value: object, module: str, name: str) -> bool:
    cls = getattr(sys.modules.get(module), name, None)
    return isinstance(cls, type) and isinstance(value, cls)


def _has_torch_group() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and bool(dist.is_available()) and bool(dist.is_initialized())
