"""The host's side of the GPU executor between nodes, without a GPU: the driver's part is played by the host itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_job import small_config, wait_for

from commlib.bootstrap import Bootstrap, connect
from commlib.config import RuntimeConfig
from commlib.cuda import tiers as tiers_module
from commlib.cuda.tiers import Tiers
from commlib.errors import CommError, CommTimeout, PeerLostError
from commlib.launch_plan import plan_launch
from commlib.testing.spawn import check_ranks
from commlib.topology import Topology

pytestmark = pytest.mark.multirank

NODES = Topology((0, 0, 1, 1))


def open_tiers(
    boot: Bootstrap, config: RuntimeConfig, mapped: list[int], nodes: Topology = NODES, row_bytes: int = 1024
) -> Tiers:
    def map_host_memory(address: int, num_bytes: int) -> tuple[int, bool]:
        assert num_bytes > 0
        mapped.append(address)
        return address, True

    fakes: dict[Any, dict[str, Any]] = {
        tiers_module: {"map_host_memory": map_host_memory, "unmap_host_memory": mapped.remove},
        torch.Tensor: {"cuda": lambda self: self},
        torch.cuda: {"current_stream": lambda: SimpleNamespace(synchronize=lambda: None)},
    }
    for owner, names in fakes.items():
        for name, value in names.items():
            setattr(owner, name, value)
    return Tiers(boot, config, nodes, plan_launch(config, nodes), row_bytes, SimpleNamespace(stop_address=0), 30.0, [])


def fault_of(tiers: Tiers) -> CommError:
    assert wait_for(lambda: tiers.fault() is not None)
    found = tiers.fault()
    assert found is not None
    return found


def host_rank() -> None:
    boot = connect(None)
    config = small_config(num_sms=6)
    note = SimpleNamespace(rank=3, peer=1, epoch=7, expected=5, seen=4)
    for case in ("quiet", "timeout", "lost", "left"):
        mapped: list[int] = []
        tiers = open_tiers(boot, config, mapped)
        assert len(mapped) == 3 and tiers.registered_bytes > 0 and tiers.num_in_sources == 1
        assert (
            "of 6 SMs 1 serve own tokens, 1 (by load 1 to 1) those of other nodes" in tiers.describe()
            and tiers.fault() is None
        )
        boot.barrier(30)
        if boot.rank == 3:
            if case == "timeout":
                tiers.tell(note, "dispatch/forward", 2.0)
            elif case == "lost":
                tiers.tell_lost(2)
            elif case == "left":
                tiers.tell_left()
        if case != "quiet":
            found = fault_of(tiers)
            kind = CommTimeout if case == "timeout" else PeerLostError
            assert type(found) is kind, found
            assert found.peer == {"timeout": 1, "lost": 2, "left": 3}[case]
            if isinstance(found, CommTimeout):
                assert (found.rank, found.tag, found.expected, found.seen) == (3, 7, 5, 4)
                assert str(found).startswith(
                    "rank 3 waited for rank 1 in dispatch/forward on channel 1 -> 3, epoch 7: expected 5, seen 4; no "
                    f"progress for 2 s; noticed by rank {boot.rank}"
                )
        boot.barrier(30)
        tiers.close(is_quiet=case == "quiet")
        tiers.close(is_quiet=True)
        assert mapped == [] and tiers.fault() is None and tiers.counters()["data_bytes"] == 0
        boot.barrier(30)


def test_faults_reach_all_nodes_and_memory_goes() -> None:
    check_ranks("test_tiers_host:host_rank", 4, ranks_per_node=2, env={"UCX_TLS": "tcp,self"}, timeout_s=100)
