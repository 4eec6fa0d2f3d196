"""A layer whose rows travel without commlib: what the comparison compares with."""

from __future__ import annotations

from typing import Any

from commlib import overlap
from commlib.testing.torch_exchange import TorchExchange


def run_layer_with_torch(exchange: TorchExchange, layer: overlap.Layer, *state: Any) -> overlap.State:
    """`overlap.run_layer` by permutations and all-to-all of torch.distributed. No FP8."""
    attended = layer.attention(*state)
    received: Any = exchange.dispatch(attended.x, attended.topk_idx, attended.topk_weights)
    combined = exchange.combine(layer.mlp(received), received.handle)
    return layer.finish(attended.kept, combined)
