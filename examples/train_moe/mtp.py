"""Multi-token prediction, one depth: from position t, also predict byte t+2.

DeepSeek-V3 technical report (arXiv 2412.19437), section 2.2: the trunk's state at t and the embedding of byte t+1
(known in training) are normalised, joined, projected and passed through one more block. Embedding and output head are
the trunk's own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.moe_layer import Linear
from examples.train_moe.attention import RMSNorm


class MultiTokenPrediction(nn.Module):
    """`norm(block(M [norm(h); norm(embedding of the next byte)]))`, ready for the shared output head."""

    def __init__(self, hidden: int, block: nn.Module) -> None:
        super().__init__()
        self.h_norm = RMSNorm(hidden)
        self.embedding_norm = RMSNorm(hidden)
        self.project = Linear(2 * hidden, hidden)
        self.block = block
        self.norm = RMSNorm(hidden)

    def join(self, h: Tensor, next_embedded: Tensor) -> Tensor:
        """What the block reads: h and next_embedded FP32 [batch, seq, hidden] -> FP32 [batch, seq, hidden]."""
        joined: Tensor = self.project(torch.cat([self.h_norm(h), self.embedding_norm(next_embedded)], dim=-1))
        return joined
