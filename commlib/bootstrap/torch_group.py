"""The bootstrap over a torch.distributed ProcessGroup or a 1-D DeviceMesh.

Collectives of torch say that something timed out, not who. So each call starts with a roll call through the group's
key-value store, which names the missing ranks on every rank and leaves the group itself untouched; the bytes then
travel as uint8 tensors. A group without a store falls back to gloo's `monitored_barrier` (rank 0 names the missing), or
to the timeout of the collective.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from commlib.bootstrap.interface import Deadline, check_payload, check_usable, missing_ranks
from commlib.errors import CommError, CommTimeout, ConfigError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["TorchBootstrap"]

_KEY = "commlib/bootstrap"
_MIN_WAIT = timedelta(milliseconds=10)  # torch reads 0 as "no timeout"


class TorchBootstrap:
    """Ranks of a torch process group, numbered within the group. Implements `Bootstrap`.

    Args:
        group: a process group of which this process is a member, or a 1-D device mesh, ``mesh["ep"]``. gloo
            exchanges CPU tensors, nccl tensors on the current CUDA device.
        timeout_s: seconds within which all ranks of the group must construct theirs.

    Raises:
        CommTimeout: names the ranks that did not come.
        ConfigError: a mesh with several dimensions.
    """

    def __init__(self, group: dist.ProcessGroup | DeviceMesh, *, timeout_s: float) -> None:
        self._group = _group_of_mesh(group) if isinstance(group, DeviceMesh) else group
        self.rank = dist.get_rank(self._group)
        self.size = dist.get_world_size(self._group)
        self._backends = str(dist.get_backend_config(self._group))  # for example "cpu:gloo,cuda:nccl"
        has_cpu = "cpu:" in self._backends
        self._device = torch.device("cpu") if has_cpu else torch.device("cuda", torch.cuda.current_device())
        self._round = 0
        self._failure: str | None = None
        self._is_closed = False
        self._store = _group_store(self._group)
        self._instance = 0
        if self._store is not None:
            # One counter per rank: equal on all of them, because all open their Runtimes in one order.
            self._instance = self._store.add(f"{_KEY}/{self.rank}", 1)
        self.barrier(timeout_s)

    def allgather(self, payload: bytes, *, timeout_s: float) -> list[bytes]:
        """See `Bootstrap.allgather`."""
        check_usable(self._is_closed, self._failure)
        check_payload(payload)
        deadline = Deadline(timeout_s)
        try:
            self._call_roll(deadline)
            result = self._gather(payload, deadline)
        except CommError as error:
            self._failure = str(error)
            raise
        self._round += 1
        return result

    def barrier(self, timeout_s: float) -> None:
        """See `Bootstrap.barrier`."""
        self.allgather(b"", timeout_s=timeout_s)

    def close(self) -> None:
        """See `Bootstrap.close`. The group stays the caller's."""
        self._is_closed = True

    def describe(self) -> str:
        """See `Bootstrap.describe`."""
        return f"torch process group ({self._backends}), rank {self.rank} of {self.size}"

    def _call_roll(self, deadline: Deadline) -> None:
        if self._store is not None:
            self._call_roll_by_store(self._store, deadline)
        elif "cpu:gloo" in self._backends:
            self._call_roll_by_barrier(deadline)

    def _call_roll_by_store(self, store: Store, deadline: Deadline) -> None:
        def key(rank: int, round_number: int) -> str:
            return f"{_KEY}/{self._instance}/{round_number}/{rank}"

        store.set(key(self.rank, self._round), "here")
        keys = [key(rank, self._round) for rank in range(self.size)]
        try:
            store.wait(keys, _remaining(deadline))
        except RuntimeError as error:  # DistStoreError, and what older versions raise
            missing = [rank for rank in range(self.size) if not store.check([keys[rank]])]
            if not missing:
                raise self._timeout(error, deadline) from error
            raise missing_ranks(
                "torch group",
                missing,
                rank=self.rank,
                size=self.size,
                seen=self.size - len(missing),
                waited_s=deadline.timeout_s,
                tag=self._round,
            ) from error
        if self._round > 0:
            # Everybody is in this round, so nobody looks at the last one any more.
            store.delete_key(key(self.rank, self._round - 1))

    def _call_roll_by_barrier(self, deadline: Deadline) -> None:
        try:
            dist.monitored_barrier(self._group, timeout=_remaining(deadline), wait_all_ranks=True)
        except RuntimeError as error:
            raise self._timeout(error, deadline) from error

    def _gather(self, payload: bytes, deadline: Deadline) -> list[bytes]:
        length = torch.tensor([len(payload)], dtype=torch.int64, device=self._device)
        lengths = [int(each.item()) for each in self._all_gather(length, deadline)]
        # all_gather wants equal shapes; the padding is cut off again.
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        if payload:
            padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        if not max(lengths):
            return [b""] * self.size
        rows = self._all_gather(padded.to(self._device), deadline)
        return [row[:length].cpu().numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]

    def _all_gather(self, tensor: torch.Tensor, deadline: Deadline) -> list[torch.Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            work: Any = dist.all_gather(gathered, tensor, group=self._group, async_op=True)
            work.wait(_remaining(deadline))
        except RuntimeError as error:
            raise self._timeout(error, deadline) from error
        return gathered

    def _timeout(self, error: RuntimeError, deadline: Deadline) -> CommError:
        text = str(error).partition("\n")[0]
        if not deadline.has_passed() and "imeout" not in text and "imed out" not in text:
            return CommError(f"torch group, rank {self.rank} of {self.size}: {text}")
        return CommTimeout(
            f"torch group: not all of {self.size} ranks arrived within {deadline.timeout_s:g} s: {text}",
            rank=self.rank,
            peer=None,
            channel="bootstrap",
            phase="rendezvous",
            tag=self._round,
            expected=self.size,
            seen=1,
        )


def _remaining(deadline: Deadline) -> timedelta:
    return max(_MIN_WAIT, timedelta(seconds=deadline.remaining_s()))


def _group_of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup:
    if mesh.ndim == 1:
        return mesh.get_group()
    names = mesh.mesh_dim_names
    if names is None:
        raise ConfigError(f"the device mesh has {mesh.ndim} dimensions without names; pass a 1-D mesh or a group of it")
    wanted = "ep" if "ep" in names else names[-1]
    listed = ", ".join(map(repr, names))
    raise ConfigError(f"the device mesh has {mesh.ndim} dimensions ({listed}); pass one of them, mesh[{wanted!r}]")


def _group_store(group: dist.ProcessGroup) -> Store | None:
    """The group's key-value store, or None: not every version and backend hands it out."""
    get_store: Callable[[], Store] | None = getattr(group, "get_group_store", None)
    if get_store is None:
        return None
    try:
        return get_store()
    except RuntimeError:
        return None
