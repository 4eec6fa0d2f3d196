"""The language model: embedding, blocks of MLA and (dense or MoE) feed-forward, output head, and the MTP module.

The residual stream, the norms, the gate, the embedding and the output head stay in FP32; the large matmuls and what
travels between ranks use `compute_dtype`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import commlib
from commlib import routing
from examples.moe_layer import Linear, MoELayer, Routed, SwiGLU
from examples.train_moe.attention import MLA, RMSNorm
from examples.train_moe.config import VOCAB, ModelConfig, TrainConfig
from examples.train_moe.mtp import MultiTokenPrediction


class ModelOutput(NamedTuple):
    """`logits` FP32 [batch, seq, VOCAB] for byte t+1, `mtp_logits` for byte t+2 or None, `routed` per MoE layer."""

    logits: Tensor
    mtp_logits: Tensor | None
    routed: list[Routed]


class Transformer(nn.Module):
    """The whole model. Expert weights exist only on their rank; everything else is the same on all ranks."""

    def __init__(self, config: ModelConfig, runtime: commlib.Runtime, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = compute_dtype
        self.embedding = nn.Embedding(VOCAB, config.hidden)
        self.blocks = nn.ModuleList(
            Block(config, runtime, compute_dtype, is_moe=layer >= config.num_dense_layers)
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden)
        self.head = Linear(config.hidden, VOCAB)
        self.mtp = MultiTokenPrediction(config.hidden, Block(config, runtime, compute_dtype, is_moe=True))

    def forward(self, tokens: Tensor, with_mtp: bool = True) -> ModelOutput:
        """tokens int64 [batch, seq + 1]: bytes 0..seq-1 are read; byte t+1 helps the MTP module to predict t+2."""
        embedded = self.embedding(tokens)
        h = embedded[:, :-1]
        chosen = []
        for block in self.blocks:
            h, routed = block(h)
            chosen.append(routed)
        mtp_logits = None
        if with_mtp:
            mtp_h, routed = self.mtp(h, embedded[:, 1:])
            mtp_logits = self.head(mtp_h)
            chosen.append(routed)
        return ModelOutput(self.head(self.norm(h)), mtp_logits, [routed for routed in chosen if routed is not None])

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, in the order of `ModelOutput.routed`."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]


class Block(nn.Module):
    """`h += attention(norm(h))`, then `h += feed_forward(norm(h))`."""

    def __init__(
        self, config: ModelConfig, runtime: commlib.Runtime, compute_dtype: torch.dtype, *, is_moe: bool
    ) -> None:
        super().__init__()
        self._dtype = compute_dtype
        self.attention_norm = RMSNorm(config.hidden)
        self.attention = MLA(config)
        self.ffn_norm = RMSNorm(config.hidden)
        self.ffn: MoELayer | SwiGLU
        if is_moe:
            self.ffn = MoELayer(config.hidden, config.expert_width, config.num_shared, config.gate, runtime)
        else:
            self.ffn = SwiGLU(config.hidden, config.dense_width)

    def forward(self, h: Tensor) -> tuple[Tensor, Routed | None]:
        """h FP32 [batch, seq, hidden] -> (the same shape, what the gate chose for its batch * seq tokens)."""
        h = h + self.attention(self.attention_norm(h).to(self._dtype))
        x = self.ffn_norm(h).to(self._dtype)
        if isinstance(self.ffn, SwiGLU):
            return h + self.ffn(x), None
        y, routed = self.ffn(x.flatten(0, 1))
        return h + y.view_as(h), routed


class Losses(NamedTuple):
    """FP32 scalars, means over this rank's part of the batch. `total = main + lambda * mtp + balance`."""

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor


def training_losses(model: Transformer, windows: Tensor, config: TrainConfig) -> tuple[Losses, Tensor]:
    """Losses of `windows` (int64 [batch, seq_len + 2]), and the global batch's load: int64 [MoE layers, experts]."""
    output = model(windows[:, :-1])
    main = next_byte_loss(output.logits, windows[:, 1:-1])
    mtp = next_byte_loss(output.mtp_logits, windows[:, 2:])
    balance = torch.stack(
        [
            routing.sequence_balance_loss(routed.scores, model.config.gate, config.seq_len, config.balance_alpha)
            for routed in output.routed
        ]
    ).sum()
    total = main + config.mtp_lambda * mtp + balance
    return Losses(total, main, mtp, balance), torch.tensor([routed.load for routed in output.routed])


def next_byte_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats; logits [batch, seq, VOCAB], targets int64 [batch, seq]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
