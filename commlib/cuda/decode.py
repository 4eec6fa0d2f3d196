"""What the latency regime asks of a dispatch, within a node and between nodes."""

from __future__ import annotations

from commlib.config import RuntimeConfig
from commlib.cuda.calls import check_alignment
from commlib.cuda.launch import MAX_SHARED_BYTES, choices_bytes
from commlib.errors import ConfigError
from commlib.executor import DispatchCall
from commlib.layout import most_rows

__all__ = ["check_decode", "check_decode_rows", "most_decode_rows", "packet_room"]


def check_decode(call: DispatchCall, config: RuntimeConfig) -> int:
    """The alignment of a dispatch in this regime. Raises ConfigError for what it does not serve."""
    if config.decode_tokens is None:
        raise ConfigError('regime="latency" needs a RuntimeConfig with decode_tokens')
    if call.handle is not None or str(call.layout) != "grouped":
        raise ConfigError('regime="latency" has fresh dispatches in layout "grouped" only')
    return check_alignment(call.expert_alignment, config, num_bits=20)


def check_decode_rows(num_tokens: int, dtype: str, config: RuntimeConfig) -> None:
    """Raises ConfigError for more rows than that, or another dtype than "bfloat16"."""
    if dtype != "bfloat16" or num_tokens > (config.decode_tokens or 0):
        raise ConfigError(
            f'regime="latency" takes at most decode_tokens={config.decode_tokens} rows of bfloat16, '
            f"not {num_tokens} of {dtype}"
        )


def most_decode_rows(config: RuntimeConfig, num_ranks: int, alignment: int) -> int:
    """Rows that a rank may get, padding included."""
    tokens = num_ranks * (config.decode_tokens or 0)
    return most_rows(tokens, config.num_topk, config.num_experts // num_ranks, alignment)


def packet_room(config: RuntimeConfig, num_ranks: int) -> int:
    """Shared memory that the choices of all ranks' tokens leave a block for rows."""
    chosen = choices_bytes(config.decode_tokens or 0, config.num_topk, config.num_experts, num_ranks)
    return max(0, MAX_SHARED_BYTES - chosen)
