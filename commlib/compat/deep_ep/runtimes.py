"""The Runtimes behind the buffers of a group.

A Runtime has a fixed shape, but clients tell theirs with the first dispatch only. So buffers open Runtimes when a
dispatch needs one, one per (device, hidden, experts, top-k), shared by all buffers of the group. Opening is collective,
like the dispatch that causes it.

Handles hold the Runtime that made them, so they outlive their buffer. Runtimes outlive buffers as well: a buffer that
is dropped is dropped at another moment on every rank, and closing is collective. They are closed when the last buffer
of their group is destroyed explicitly, and otherwise end with the process.
"""

from __future__ import annotations

import atexit
import dataclasses
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from commlib.config import RuntimeConfig
from commlib.errors import ConfigError
from commlib.layout import default_arena_bytes
from commlib.runtime import Runtime
from commlib.topology import Topology

__all__ = ["BufferBase", "GroupRuntimes", "Shape", "rank_and_size", "topology_of"]

# Tokens of a rank and dispatch, where a Runtime has a limit: more than trainers send. It costs 16 bytes a slot.
_MOST_TOKENS = 1 << 16


class Shape(NamedTuple):
    """What a Runtime is made for."""

    device: torch.device
    hidden: int
    num_experts: int
    num_topk: int


class GroupRuntimes:
    """The Runtimes of one group, and how many of its buffers are still to be destroyed."""

    def __init__(self, group: Any) -> None:
        self.group = group  # held, so that no other group can take its id()
        self.num_buffers = 0
        self._runtimes: dict[Shape, Runtime] = {}

    def get(self, shape: Shape, limits: dict[str, Any]) -> Runtime:
        """The Runtime for `shape`; opens it, together with the other ranks, if this is the first call.

        Args:
            shape: equal on all ranks, but for the device.
            limits: further fields of RuntimeConfig; only the call that opens looks at them.
        """
        runtime = self._runtimes.get(shape)
        if runtime is None:
            config = RuntimeConfig(
                hidden=shape.hidden, num_experts=shape.num_experts, num_topk=shape.num_topk, **limits
            )
            if shape.device.type != "cpu":
                config = _without_limit(config, *rank_and_size(self.group))
            runtime = self._runtimes[shape] = Runtime(self.group, config, device=shape.device)
        return runtime

    def topology(self) -> Topology | None:
        """Which rank sits on which node; None before the first dispatch."""
        return next((runtime.topology for runtime in self._runtimes.values()), None)

    def close(self) -> None:
        """Closes all Runtimes, in one order on all ranks, also if one of them fails."""
        with ExitStack() as stack:
            for runtime in self._runtimes.values():
                stack.callback(runtime.close)
            self._runtimes = {}

    def forget(self) -> None:
        """Lets go of the Runtimes without a word to the other ranks; handles may still hold them."""
        self._runtimes.clear()


_groups: dict[int, GroupRuntimes] = {}


@atexit.register
def _forget_all() -> None:
    """Before the interpreter takes modules apart, so that what is native ends in order."""
    for runtimes in _groups.values():
        runtimes.forget()


def _without_limit(config: RuntimeConfig, rank: int, num_ranks: int) -> RuntimeConfig:
    """On GPUs `max_tokens` is a limit besides what the arena is sized for, and clients do not always tell theirs."""
    arena_bytes = config.arena_bytes or default_arena_bytes(config, Topology.uniform(num_ranks, num_ranks), rank)
    return dataclasses.replace(config, max_tokens=max(config.max_tokens, _MOST_TOKENS), arena_bytes=arena_bytes)


def rank_and_size(group: Any) -> tuple[int, int]:
    """Of a torch ProcessGroup or an mpi4py communicator."""
    if hasattr(group, "Get_rank"):
        return int(group.Get_rank()), int(group.Get_size())
    return int(group.rank()), int(group.size())


def topology_of(group: Any) -> tuple[int, int]:
    """(number of nodes, ranks per node) of `group`.

    Raises:
        NotImplementedError: before the first dispatch; or nodes hold different numbers of ranks.
    """
    runtimes = _groups.get(id(group))
    topology = None if runtimes is None else runtimes.topology()
    if topology is None:
        raise NotImplementedError("commlib's deep_ep knows the nodes of a group from its first dispatch on, not before")
    sizes = {len(topology.ranks_of_node(node)) for node in range(topology.num_nodes)}
    if len(sizes) > 1:
        raise NotImplementedError(f"commlib's deep_ep has no domain sizes for nodes of {sorted(sizes)} ranks")
    return topology.num_nodes, sizes.pop()


class BufferBase:
    """What all kinds of buffers have in common. Construction communicates nothing.

    Args:
        group: torch ProcessGroup, or an mpi4py communicator.
        explicitly_destroy: whether `destroy` will be called.
        limits: fields of RuntimeConfig besides the shape.
    """

    def __init__(self, group: Any, *, explicitly_destroy: bool, limits: dict[str, Any]) -> None:
        self.group = group
        self.explicitly_destroy = explicitly_destroy
        self._rank, self._num_ranks = rank_and_size(group)
        self._limits = limits
        self._runtimes: GroupRuntimes | None = _groups.setdefault(id(group), GroupRuntimes(group))
        self._runtimes.num_buffers += 1

    def destroy(self) -> None:
        """Collective. Closes the group's Runtimes if this is the last of its buffers; handles end with them.

        Raises:
            ConfigError: the buffer was made without `explicitly_destroy`.
        """
        if not self.explicitly_destroy:
            raise ConfigError("destroy() is for buffers made with explicitly_destroy=True")
        runtimes, self._runtimes = self._runtimes, None
        if runtimes is None:
            return
        runtimes.num_buffers -= 1
        if runtimes.num_buffers == 0:
            _groups.pop(id(self.group), None)
            runtimes.close()

    def _runtime(
        self, x: Tensor, num_experts: int, num_topk: int, *, num_sms: int, hidden: int | None = None
    ) -> Runtime:
        """The Runtime for tokens like `x` [num_tokens, hidden]; `num_sms` counts if it is opened now."""
        if self._runtimes is None:
            raise ConfigError("this buffer is destroyed")
        shape = Shape(x.device, x.shape[1] if hidden is None else hidden, int(num_experts), int(num_topk))
        return self._runtimes.get(shape, {**self._limits, "num_sms": num_sms})
