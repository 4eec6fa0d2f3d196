import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commlib.errors import ConfigError
from commlib.topology import Topology, node_key

# Ranks 0 2 3 on node 0, 1 4 on node 1, 5 alone on node 2.
UNEVEN = Topology((0, 1, 0, 0, 1, 2))

topologies = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12).map(Topology.from_node_keys)


def test_by_hand() -> None:
    assert (UNEVEN.num_ranks, UNEVEN.num_nodes) == (6, 3)
    assert [UNEVEN.ranks_of_node(node) for node in range(3)] == [(0, 2, 3), (1, 4), (5,)]
    assert [UNEVEN.local_rank(rank) for rank in range(6)] == [0, 0, 1, 2, 1, 0]
    assert [UNEVEN.num_local_ranks(rank) for rank in range(6)] == [3, 2, 3, 3, 2, 1]
    # Local rank 2 of node 0 wraps to local rank 0 of node 1.
    assert [UNEVEN.rail(3, node) for node in range(3)] == [3, 1, 5]
    assert [UNEVEN.rail(4, node) for node in range(3)] == [2, 4, 5]
    assert [UNEVEN.in_sources(rank) for rank in range(6)] == [(1, 5), (0, 3, 5), (4,), (), (2,), (0, 1, 2, 3, 4)]
    assert UNEVEN.scale_up_peers(2) == (0, 3)
    assert UNEVEN.scale_up_peers(5) == ()
    assert UNEVEN.scale_out_peers(3) == (1, 5)
    assert UNEVEN.scale_out_peers(5) == (0, 1, 2, 3, 4)
    assert UNEVEN.node_of_expert(12) == (0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 2, 2)
    assert [UNEVEN.expert_rank(expert, 12) for expert in (0, 1, 2, 11)] == [0, 0, 1, 5]


def test_from_node_keys_numbers_by_first_appearance() -> None:
    assert Topology.from_node_keys(["z", "a", "z", "m"]) == Topology((0, 1, 0, 2))


def test_uniform() -> None:
    assert Topology.uniform(5, 2).node_of_rank == (0, 0, 1, 1, 2)
    assert Topology.uniform(2, 8).node_of_rank == (0, 0)


@given(topologies)
def test_rails_and_in_sources_are_inverse(topology: Topology) -> None:
    ranks = range(topology.num_ranks)
    for source in ranks:
        assert topology.rail(source, topology.node(source)) == source
        for node in range(topology.num_nodes):
            assert topology.node(topology.rail(source, node)) == node
    for rank in ranks:
        expected = [
            source
            for source in ranks
            if topology.node(source) != topology.node(rank) and topology.rail(source, topology.node(rank)) == rank
        ]
        assert list(topology.in_sources(rank)) == expected


@given(topologies)
def test_peers_are_symmetric_and_disjoint(topology: Topology) -> None:
    for rank in range(topology.num_ranks):
        near, far = topology.scale_up_peers(rank), topology.scale_out_peers(rank)
        assert len(near) == topology.num_local_ranks(rank) - 1
        assert not set(near) & set(far) and rank not in near + far
        assert list(far) == sorted(set(far))
        assert all(rank in topology.scale_up_peers(peer) for peer in near)
        assert all(rank in topology.scale_out_peers(peer) for peer in far)


@given(topologies, st.integers(1, 4))
def test_experts_lie_on_the_node_of_their_rank(topology: Topology, num_local_experts: int) -> None:
    num_experts = topology.num_ranks * num_local_experts
    nodes = topology.node_of_expert(num_experts)
    assert len(nodes) == num_experts
    assert all(nodes[e] == topology.node(topology.expert_rank(e, num_experts)) for e in range(num_experts))


@pytest.mark.parametrize("nodes", [(), (1,), (0, 2), (0, -1)])
def test_bad_node_lists(nodes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        Topology(nodes)


def test_bad_arguments_name_value_and_rule() -> None:
    with pytest.raises(ConfigError, match=r"rank=6 is not in 0\.\.5"):
        UNEVEN.local_rank(6)
    with pytest.raises(ConfigError, match=r"rank=-1 is not in 0\.\.5"):
        UNEVEN.rail(-1, 0)
    with pytest.raises(ConfigError, match=r"node=3 is not in 0\.\.2"):
        UNEVEN.ranks_of_node(3)
    with pytest.raises(ConfigError, match=r"expert=12 is not in 0\.\.11"):
        UNEVEN.expert_rank(12, 12)
    with pytest.raises(ConfigError, match="num_experts=13 is not divisible by num_ranks=6"):
        UNEVEN.node_of_expert(13)
    with pytest.raises(ConfigError, match="num_ranks=0 and ranks_per_node=2"):
        Topology.uniform(0, 2)


def test_describe_shows_every_rank() -> None:
    text = UNEVEN.describe()
    assert text.splitlines()[0] == "6 ranks on 3 nodes"
    assert "node 1: ranks 1 4" in text
    assert "rank 5 (local rank 0): scale-up -; rails 0 1; forwards for 0 1 2 3 4" in text


def test_node_key_is_the_same_in_another_process() -> None:
    program = "from commlib.topology import node_key; print(node_key())"
    environ = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == node_key()


def test_node_key_holds_what_memory_sharing_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.stat
    before = node_key()
    for path in ("/proc/self/ns/pid", "/proc/self/ns/ipc", "/proc/self/ns/mnt", "/dev/shm"):

        def other(asked: str, path: str = path) -> os.stat_result:
            # Another file's numbers stand for another namespace.
            return real(__file__ if asked == path else asked)

        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", other)
            key = node_key()
        assert key != before, path
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert node_key() != before
