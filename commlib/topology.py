"""Which rank sits on which node, and which rank forwards for which: pure arithmetic, equal on all ranks."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from commlib.errors import CommError, ConfigError

__all__ = ["Topology", "node_key"]


@dataclass(frozen=True)
class Topology:
    """Ranks and their nodes. Nodes are numbered by first appearance; they may hold different numbers of ranks.

    Attributes:
        node_of_rank: for each rank its node.

    Raises:
        ConfigError: no ranks, or nodes not numbered by first appearance.
    """

    node_of_rank: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "node_of_rank", tuple(int(node) for node in self.node_of_rank))
        if not self.node_of_rank:
            raise ConfigError("node_of_rank=() holds no rank; a topology needs at least 1")
        num_seen = 0
        for rank, node in enumerate(self.node_of_rank):
            if not 0 <= node <= num_seen:
                raise ConfigError(
                    f"node_of_rank[{rank}]={node} is out of order: nodes are numbered by first appearance, "
                    f"so it must be in 0..{num_seen}"
                )
            num_seen = max(num_seen, node + 1)

    @classmethod
    def from_node_keys(cls, keys: Sequence[str]) -> Topology:
        """One key per rank (see `node_key`); ranks with equal keys share a node."""
        numbers: dict[str, int] = {}
        return cls(tuple(numbers.setdefault(key, len(numbers)) for key in keys))

    @classmethod
    def uniform(cls, num_ranks: int, ranks_per_node: int) -> Topology:
        """Consecutive ranks fill nodes of `ranks_per_node`; the last node may be smaller."""
        if num_ranks < 1 or ranks_per_node < 1:
            raise ConfigError(f"num_ranks={num_ranks} and ranks_per_node={ranks_per_node} must both be >= 1")
        return cls(tuple(rank // ranks_per_node for rank in range(num_ranks)))

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_rank)

    @property
    def num_nodes(self) -> int:
        return len(self._members)

    @cached_property
    def _members(self) -> tuple[tuple[int, ...], ...]:
        members: list[list[int]] = [[] for _ in range(max(self.node_of_rank) + 1)]
        for rank, node in enumerate(self.node_of_rank):
            members[node].append(rank)
        return tuple(tuple(ranks) for ranks in members)

    @cached_property
    def _local_ranks(self) -> tuple[int, ...]:
        local_ranks = [0] * self.num_ranks
        for ranks in self._members:
            for local_rank, rank in enumerate(ranks):
                local_ranks[rank] = local_rank
        return tuple(local_ranks)

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.num_ranks:
            raise ConfigError(f"rank={rank} is not in 0..{self.num_ranks - 1}")

    def ranks_of_node(self, node: int) -> tuple[int, ...]:
        """The ranks of `node`, ascending."""
        if not 0 <= node < self.num_nodes:
            raise ConfigError(f"node={node} is not in 0..{self.num_nodes - 1}")
        return self._members[node]

    def node(self, rank: int) -> int:
        """The node of `rank`."""
        self._check_rank(rank)
        return self.node_of_rank[rank]

    def local_rank(self, rank: int) -> int:
        """Position of `rank` among the ranks of its node."""
        self._check_rank(rank)
        return self._local_ranks[rank]

    def num_local_ranks(self, rank: int) -> int:
        """Number of ranks on the node of `rank`, itself included."""
        return len(self._members[self.node(rank)])

    def rail(self, source: int, node: int) -> int:
        """The rank on `node` that receives and forwards for `source`; `source` itself on its own node."""
        ranks = self.ranks_of_node(node)
        return ranks[self.local_rank(source) % len(ranks)]

    def in_sources(self, rank: int) -> tuple[int, ...]:
        """The ranks of other nodes whose rail on this rank's node is `rank`, ascending."""
        node = self.node(rank)
        num_local_ranks, local_rank = len(self._members[node]), self._local_ranks[rank]
        return tuple(
            source
            for source in range(self.num_ranks)
            if self.node_of_rank[source] != node and self._local_ranks[source] % num_local_ranks == local_rank
        )

    def scale_up_peers(self, rank: int) -> tuple[int, ...]:
        """The other ranks of this rank's node, ascending."""
        return tuple(peer for peer in self._members[self.node(rank)] if peer != rank)

    def scale_out_peers(self, rank: int) -> tuple[int, ...]:
        """The ranks of other nodes to which this rank has a connection: its rails and its `in_sources`, ascending."""
        own = self.node(rank)
        rails = {self.rail(rank, node) for node in range(self.num_nodes) if node != own}
        return tuple(sorted(rails.union(self.in_sources(rank))))

    def _num_local_experts(self, num_experts: int) -> int:
        if num_experts < 1 or num_experts % self.num_ranks:
            raise ConfigError(f"num_experts={num_experts} is not divisible by num_ranks={self.num_ranks}")
        return num_experts // self.num_ranks

    def expert_rank(self, expert: int, num_experts: int) -> int:
        """The rank that holds `expert`: experts lie in contiguous blocks of `num_experts // num_ranks`."""
        num_local_experts = self._num_local_experts(num_experts)
        if not 0 <= expert < num_experts:
            raise ConfigError(f"expert={expert} is not in 0..{num_experts - 1}")
        return expert // num_local_experts

    def node_of_expert(self, num_experts: int) -> tuple[int, ...]:
        """For each of `num_experts` experts the node that holds it."""
        num_local_experts = self._num_local_experts(num_experts)
        return tuple(self.node_of_rank[expert // num_local_experts] for expert in range(num_experts))

    def describe(self) -> str:
        """A table for people: nodes with their ranks, then for each rank the peers that it writes to and reads from."""
        lines = [f"{self.num_ranks} ranks on {self.num_nodes} nodes"]
        for node, ranks in enumerate(self._members):
            lines.append(f"node {node}: ranks {_join(ranks)}")
            for rank in ranks:
                peers = self.scale_up_peers(rank)
                rails = [self.rail(rank, other) for other in range(self.num_nodes) if other != node]
                lines.append(
                    f"  rank {rank} (local rank {self._local_ranks[rank]}): scale-up {_join(peers)}; "
                    f"rails {_join(rails)}; forwards for {_join(self.in_sources(rank))}"
                )
        return "\n".join(lines)


def _join(ranks: Sequence[int]) -> str:
    return " ".join(map(str, ranks)) if ranks else "-"


def _fact(path: str, *, attribute: str) -> str:
    """One number of `os.stat`; a kernel without the file has nothing in which processes could differ."""
    try:
        return str(getattr(os.stat(path), attribute))
    except FileNotFoundError:
        return "absent"
    except OSError as error:
        raise CommError(f"cannot look at {path} to tell which ranks share this machine: {error.strerror}") from error


def _boot_id() -> str:
    path = "/proc/sys/kernel/random/boot_id"
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError:
        return "absent"
    except OSError as error:
        raise CommError(f"cannot read {path} to tell which ranks share this machine: {error.strerror}") from error


def node_key() -> str:
    """Names the machine with which this process can share memory; processes with equal keys form a node.

    Two containers of one machine get different keys where they could not open each other's memory through
    ``/proc/<pid>/fd``: the key holds the PID, IPC and mount namespaces and the device of ``/dev/shm``.

    Raises:
        CommError: the kernel refuses to tell.
    """
    spaces = [f"{name}={_fact(f'/proc/self/ns/{name}', attribute='st_ino')}" for name in ("pid", "ipc", "mnt")]
    shm = f"shm={_fact('/dev/shm', attribute='st_dev')}"
    return "/".join([socket.gethostname(), f"boot={_boot_id()}", *spaces, shm])
