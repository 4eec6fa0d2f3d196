"""The kernels of several nodes on this CPU (kernels_on_cpu.py), a process a rank, over TCP of this machine."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines_on_cpu import CpuEngine, NoEvent, regions_of, replace_cuda
from kernels_on_cpu import CpuKernels
from row_cases import Case
from test_rings_host import Scene
from test_tiers_host import open_tiers

from commlib.bootstrap import Bootstrap, connect
from commlib.config import RuntimeConfig
from commlib.testing.payloads import identity_payload, random_payload
from commlib.testing.spawn import check_ranks
from commlib.testing.workloads import make_workload
from commlib.topology import Topology

pytestmark = pytest.mark.multirank

EXPERTS, TOPK, HIDDEN, TOKENS = 3, 3, 128, 21  # of each rank


class SharedMemory:
    """Files that the ranks of a node map."""

    def __init__(self, folder: str, boot: Bootstrap) -> None:
        self._folder, self._boot, self._num_made = Path(folder), boot, 0

    def allocate(self, num_bytes: int) -> np.ndarray[Any, Any]:
        path = self._path(self._boot.rank, self._num_made)
        self._num_made += 1
        with path.open("wb") as file:
            file.truncate(num_bytes)
        return self._map(path)

    def peers(self, topology: Topology, number: int, own: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any] | None]:
        """What each rank has allocated as its `number`th; None: on another node. Collective."""
        self._boot.barrier(60)
        rank = self._boot.rank
        return [
            own if peer == rank else self._map(self._path(peer, number))
            if topology.node(peer) == topology.node(rank) else None
            for peer in range(topology.num_ranks)
        ]  # fmt: skip

    def _path(self, rank: int, number: int) -> Path:
        return self._folder / f"{rank}-{number}"

    def _map(self, path: Path) -> np.ndarray[Any, Any]:
        with path.open("r+b") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), os.fstat(file.fileno()).st_size), dtype=np.uint8)


def kernels_rank(
    node_of_rank: list[int], rings: str, blocks: dict[str, int], folder: str, libraries: str, names: list[str]
) -> None:
    boot = Scene().boot if rings == "device" else connect(None)
    rank, topology = boot.rank, Topology(tuple(node_of_rank))
    num_ranks = topology.num_ranks
    # Rings of a few rows, so that even a few tokens go round them several times.
    config = RuntimeConfig(
        hidden=HIDDEN, num_experts=EXPERTS * num_ranks, num_topk=TOPK, max_tokens=TOKENS + 3,
        chunk_bytes=1024, ring_bytes=4096, ring_memory=rings, timeout_s=60.0, **{"num_sms": 3, **blocks},
    )  # fmt: skip
    tiers = open_tiers(boot, config, [], topology, regions_of(config, topology).exchange_row_bytes)
    replace_cuda(pytest.MonkeyPatch())
    memory = SharedMemory(folder, boot)
    engine = CpuEngine(rank, config, topology, CpuKernels(Path(libraries)), memory.allocate, tiers)
    kept = [memory.peers(topology, 0, engine.control), memory.peers(topology, 1, engine.arena.heap.memory)]
    for places, pieces in zip((engine.mesh.base, engine.mesh.heap), kept, strict=True):
        places[:num_ranks] = [0 if piece is None else piece.ctypes.data for piece in pieces]
    kinds: list[tuple[torch.dtype, str | None, str]] = [
        (torch.bfloat16, None, "grouped"), (torch.float32, None, "rows"), (torch.bfloat16, "pow2", "grouped"),
    ]  # fmt: skip
    for seed, name in enumerate(names):
        work = make_workload(
            "uniform" if name == "idle_rail" else name,
            num_ranks=num_ranks, num_experts=config.num_experts, num_topk=TOPK, num_tokens=TOKENS, seed=seed,
        )  # fmt: skip
        if name == "idle_rail":  # no row comes to rank 2, which collects those of others all the same
            for idx in work.topk_idx:
                idx[idx // EXPERTS == 2] = -1
        dtype, fp8, layout = kinds[seed % len(kinds)]
        xs = [
            random_payload(r, count, HIDDEN, dtype, seed) if seed else identity_payload(r, count, HIDDEN, dtype)
            for r, count in enumerate(work.num_tokens)
        ]
        case = Case(work, xs, node_of_rank, layout=layout, alignment=(1, 8)[seed % 2], fp8=fp8)
        got = engine.dispatch(case.call(rank))
        case.check(rank, got)
        options: dict[str, Any] = {"dtype": torch.bfloat16, "is_weighted": True, "has_grads": True}
        case.check_combined(rank, engine.combine(case.combine_call(rank, got, **options)), **options)
        options = {"dtype": torch.float32, "is_weighted": False, "has_grads": False}
        case.check_combined(rank, engine.combine(case.combine_call(rank, got, **options)), **options)
        case.check(rank, engine.dispatch(case.call_again(rank, got)), is_by_handle=True)
    # One look at every operation's end, where puts would be calls of the driver.
    assert NoEvent.num_looks == (4 * len(names) if rings == "device" else 0)
    boot.barrier(60)
    tiers.close(is_quiet=True)
    print(f"rank {rank}: {names} OK", flush=True)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("kernels")
    kernels = CpuKernels(folder)
    for unit in ("exchange", "tier_dispatch", "tier_combine_bf16", "tier_combine_f32"):
        kernels.compile(unit)
    return str(folder)


# "device": in memory of their own, behind the words, as a GPU's would be. Two blocks at a ring, then three at two.
@pytest.mark.parametrize(
    ("node_of_rank", "rings", "blocks"),
    [
        ([0, 0, 1, 1], "host", {}),
        ([0, 1, 2], "device", {}),
        ([0, 0, 1, 1], "host", {"num_sms": 5, "out_blocks": 2, "in_blocks": 2}),
        ([0, 1, 2], "device", {"num_sms": 6, "out_blocks": 3, "in_blocks": 2}),
    ],
)
def test_there_and_back(
    node_of_rank: list[int], rings: str, blocks: dict[str, int], libraries: str, tmp_path: Path
) -> None:
    check_ranks(
        "test_tier_kernels_on_cpu:kernels_rank",
        len(node_of_rank),
        args=(node_of_rank, rings, blocks, str(tmp_path), libraries, ["uniform", "masked", "uneven", "idle_rail"]),
        env={"UCX_TLS": "tcp,self"},
        timeout_s=150,
    )
