"""What the ranks of several tests here share: small Runtimes, inputs of all ranks, and comparisons bit by bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import row_cases
import torch
from torch import Tensor

from commlib.bootstrap.rendezvous import RendezvousBootstrap
from commlib.config import RuntimeConfig
from commlib.runtime import Runtime
from commlib.testing.payloads import random_payload
from commlib.testing.spawn import free_port
from commlib.testing.workloads import Workload
from commlib.topology import Topology

TOKEN = "a token of this test"
HIDDEN = 256


def small_config(**changes: Any) -> RuntimeConfig:
    """Chunks and rings of a few rows, so that even a few tokens go round the rings several times."""
    values: dict[str, Any] = {
        "hidden": HIDDEN,
        "num_experts": 12,
        "num_topk": 3,
        "max_tokens": 64,
        "expert_alignment": 8,
        "chunk_tokens": 4,
        "chunk_bytes": 4096,
        "ring_bytes": 8192,
        "arena_bytes": 1 << 20,
        "max_arena_bytes": 1 << 28,
        "timeout_s": 60.0,
        "heartbeat_timeout_s": 30.0,
        **changes,
    }
    return RuntimeConfig(**values)


def config_of(workload: Workload, **changes: Any) -> RuntimeConfig:
    return small_config(num_experts=workload.num_experts, num_topk=workload.num_topk, **changes)


def part_of_job(port: int, rank: int, size: int) -> RendezvousBootstrap:
    """A group of its own among processes that know the port."""
    return RendezvousBootstrap(endpoint=f"tcp://127.0.0.1:{port}", token=TOKEN, rank=rank, size=size, timeout_s=60)


def free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return sorted(ports)


def open_runtime(group: Any, nodes: Sequence[int], **changes: Any) -> Runtime:
    return Runtime(group, small_config(**changes), topology=Topology(tuple(nodes)))


def assert_bits(actual: Any, expected: Tensor | None, what: str) -> None:
    """`row_cases.assert_bits`, of arrays as well."""
    row_cases.assert_bits(tensor_of(actual) if isinstance(actual, np.ndarray) else actual, expected, what)


def tensor_of(array: np.ndarray[Any, Any]) -> Tensor:
    """BF16 and FP8 arrays of ml_dtypes by their bits, which torch does not take otherwise."""
    if array.dtype.name in ("bfloat16", "float8_e4m3fn"):
        plain = array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint8)
        return torch.from_numpy(plain.copy()).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)


def expert_rows(rank: int, num_rows: int, dtype: torch.dtype, seed: int) -> Tensor:
    """What the experts of a rank are taken to return: any rank can tell what another one's are."""
    return random_payload(rank, num_rows, HIDDEN, dtype, seed)


def row_weights(rank: int, shape: Sequence[int], seed: int) -> Tensor:
    """FP32 of both signs."""
    rng = np.random.default_rng([seed, rank, 77])
    return torch.from_numpy(rng.uniform(-1, 1, size=tuple(shape)).astype(np.float32))


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
