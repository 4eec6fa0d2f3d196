"""What the latency regime asks of a dispatch, within a node and between nodes."""

from __future__ import annotations

from commlib.config import RuntimeConfig
from commlib.errors import ConfigError
from commlib.executor import DispatchCall

__all__ = ["check_decode", "check_decode_rows", "most_decode_rows"]


def check_decode(call: DispatchCall, config: RuntimeConfig) -> int:
    """The alignment of a dispatch in this regime. Raises ConfigError for what it does not serve."""
    if config.decode_tokens is None:
        raise ConfigError('regime="latency" needs a RuntimeConfig with decode_tokens')
    if call.handle is not None or str(call.layout) != "grouped":
        raise ConfigError('regime="latency" has fresh dispatches in layout "grouped" only')
    alignment = config.expert_alignment if call.expert_alignment is None else call.expert_alignment
    if not isinstance(alignment, int) or not 1 <= alignment < 2**20:
        raise ConfigError(f"expert_alignment={alignment!r} is not an integer in 1..2^20-1")
    return alignment


def check_decode_rows(num_tokens: int, dtype: str, config: RuntimeConfig) -> None:
    """Raises ConfigError for more rows than that, or another dtype than "bfloat16"."""
    if dtype != "bfloat16" or num_tokens > (config.decode_tokens or 0):
        raise ConfigError(
            f'regime="latency" takes at most decode_tokens={config.decode_tokens} rows of bfloat16, '
            f"not {num_tokens} of {dtype}"
        )


def most_decode_rows(config: RuntimeConfig, num_ranks: int, alignment: int) -> int:
    """Rows that a rank may get, padding included."""
    experts = config.num_experts // num_ranks
    tokens = num_ranks * (config.decode_tokens or 0)
    return tokens * min(config.num_topk, experts) + experts * (alignment - 1)
