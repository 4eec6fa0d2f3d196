"""Settings that clients hand over and read back, and what is not covered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from commlib.config import RuntimeConfig

__all__ = ["DEFAULT_NUM_SMS", "Config", "not_covered", "topk_idx_t"]

topk_idx_t = torch.int64

DEFAULT_NUM_SMS = RuntimeConfig.num_sms


@dataclass(frozen=True)
class Config:
    """Chunk sizes of DeepEP's kernels. Kept and shown, nothing else: commlib's chunks are those of RuntimeConfig."""

    num_sms: int = DEFAULT_NUM_SMS
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0: a Runtime sizes its memory itself, once the shape of the tokens is known."""
        return 0

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """0, see above."""
        return 0


def not_covered(name: str, why: str) -> Callable[..., NoReturn]:
    """A method that says what is missing instead of doing something else."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"commlib's deep_ep does not cover {name}: {why}")

    refuse.__name__ = name
    refuse.__doc__ = f"Not covered: {why}."
    return refuse
