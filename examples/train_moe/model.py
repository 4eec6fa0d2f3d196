"""The language model: embedding, blocks of MLA and (dense or MoE) feed-forward, output head, and the MTP module.

The residual stream, the norms, the gate, the embedding and the output head stay in FP32; the large matmuls and what
travels between ranks use `compute_dtype`.

The model is a list of layers in the sense of `commlib.overlap`: everything hangs on an MoE layer, what has none goes to
the next one's first piece. From layer to layer pass the residual stream, the embeddings that the MTP module reads, and
the sum of the balance losses so far.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import commlib
from commlib import overlap, routing
from commlib.handle import Dispatched
from examples.moe_layer import Linear, MoELayer, SwiGLU
from examples.train_moe.attention import MLA, RMSNorm
from examples.train_moe.config import VOCAB, ModelConfig, TrainConfig
from examples.train_moe.mtp import MultiTokenPrediction


class ModelOutput(NamedTuple):
    """FP32: `logits` [batch, seq, VOCAB] for byte t+1, `mtp_logits` for byte t+2 or None, `balance` (see Losses)."""

    logits: Tensor
    mtp_logits: Tensor | None
    balance: Tensor


class Transformer(nn.Module):
    """The whole model. Expert weights exist only on their rank; everything else is the same on all ranks."""

    def __init__(self, config: ModelConfig, runtime: commlib.Runtime, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = compute_dtype
        self.run_layer: Callable[..., overlap.State] = overlap.run_layer
        self.embedding = nn.Embedding(VOCAB, config.hidden)
        self.blocks = nn.ModuleList(
            DenseBlock(config, compute_dtype)
            if layer < config.num_dense_layers
            else MoEBlock(config, runtime, compute_dtype)
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden)
        self.head = Linear(config.hidden, VOCAB)
        self.mtp = MultiTokenPrediction(config.hidden, MoEBlock(config, runtime, compute_dtype))

    def forward(self, tokens: Tensor, with_mtp: bool = True) -> ModelOutput:
        """tokens int64 [batch, seq + 1]: bytes 0..seq-1 are read; byte t+1 helps the MTP module to predict t+2."""
        state: overlap.State = (tokens,)
        for layer in self.layers(with_mtp=with_mtp):
            state = self.run_layer(layer, *state)
        h, mtp_h, balance = state
        return self.predict(h, mtp_h if with_mtp else None, balance)

    def layers(self, with_mtp: bool = True) -> list[overlap.Layer]:
        """The model but for its head, from tokens to what `predict` takes; without MTP, a carried tensor is left."""
        trunk: list[overlap.Layer] = [
            TrunkLayer(self, block, is_first=layer == self.config.num_dense_layers)
            for layer, block in enumerate(self.blocks)
            if isinstance(block, MoEBlock)
        ]
        return [*trunk, MtpLayer(self.mtp)] if with_mtp else trunk

    def predict(self, h: Tensor, mtp_h: Tensor | None, balance: Tensor) -> ModelOutput:
        """The head on FP32 [batch, seq, hidden] of the trunk and of the MTP module."""
        if mtp_h is None:
            return ModelOutput(self.head(self.norm(h)), None, balance)
        logits, mtp_logits = self.head(torch.stack([self.norm(h), mtp_h]))
        return ModelOutput(logits, mtp_logits, balance)

    def moe_layers(self) -> list[MoELayer]:
        """Of the trunk, then that of the MTP module."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]


class DenseBlock(nn.Module):
    """`h += attention(norm(h))`, then `h += feed_forward(norm(h))`."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = compute_dtype
        self.attention_norm = RMSNorm(config.hidden)
        self.attention = MLA(config)
        self.ffn_norm = RMSNorm(config.hidden)
        self.ffn = SwiGLU(config.hidden, config.dense_width)

    def forward(self, h: Tensor) -> Tensor:
        """h FP32 [batch, seq, hidden] -> the same shape."""
        h = h + self.attention(self.attention_norm(h).to(self._dtype))
        return h + self.ffn(self.ffn_norm(h).to(self._dtype))


class MoEBlock(nn.Module):
    """The same with an MoE layer as its feed-forward, cut where that layer communicates."""

    def __init__(self, config: ModelConfig, runtime: commlib.Runtime, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = compute_dtype
        self.attention_norm = RMSNorm(config.hidden)
        self.attention = MLA(config)
        self.ffn_norm = RMSNorm(config.hidden)
        self.ffn = MoELayer(
            config.hidden,
            config.expert_width,
            config.num_shared,
            config.gate,
            runtime,
            is_fp8=config.fp8_experts,
        )

    def start(self, h: Tensor, carried: Tensor, balance: Tensor) -> overlap.Attended:
        """h FP32 [batch, seq, hidden] -> the rows for the experts; `carried` passes by."""
        h = h + self.attention(self.attention_norm(h).to(self._dtype))
        attended = self.ffn.attention(self.ffn_norm(h).to(self._dtype).flatten(0, 1))
        shared, scores = attended.kept
        balance = balance + routing.sequence_balance_loss(scores, self.ffn.gate_config, h.shape[1], alpha=1.0)
        return attended._replace(kept=(h, shared, carried, balance))

    def end(self, kept: overlap.State, combined: Tensor) -> overlap.State:
        """-> (h, carried, balance)."""
        h, shared, carried, balance = kept
        y, _ = self.ffn.finish((shared, balance), combined)
        return h + y.view_as(h), carried, balance


class TrunkLayer:
    """An MoE block of the trunk; the first one has the embedding and the dense blocks before it.

    (tokens) or (h, embeddings of the next bytes, balance) -> (h, embeddings of the next bytes, balance).
    """

    def __init__(self, model: Transformer, block: MoEBlock, *, is_first: bool) -> None:
        self._model, self._block, self._is_first = model, block, is_first
        self.exchange = block.ffn.exchange

    def attention(self, *state: Tensor) -> overlap.Attended:
        if not self._is_first:
            return self._block.start(*state)
        (tokens,) = state
        embedded = self._model.embedding(tokens)
        h = embedded[:, :-1]
        for block in self._model.blocks:
            if isinstance(block, DenseBlock):
                h = block(h)
        return self._block.start(h, embedded[:, 1:], h.new_zeros(()))

    def mlp(self, received: Dispatched) -> Tensor:
        return self._block.ffn.mlp(received)

    def finish(self, kept: overlap.State, combined: Tensor) -> overlap.State:
        return self._block.end(kept, combined)


class MtpLayer:
    """The MTP module: (h, embeddings of the next bytes, balance) -> (h, h of the module, balance)."""

    def __init__(self, mtp: MultiTokenPrediction) -> None:
        assert isinstance(mtp.block, MoEBlock)
        self._mtp, self._block = mtp, mtp.block
        self.exchange = mtp.block.ffn.exchange

    def attention(self, *state: Tensor) -> overlap.Attended:
        h, following, balance = state
        return self._block.start(self._mtp.join(h, following), h, balance)

    def mlp(self, received: Dispatched) -> Tensor:
        return self._block.ffn.mlp(received)

    def finish(self, kept: overlap.State, combined: Tensor) -> overlap.State:
        mtp_h, h, balance = self._block.end(kept, combined)
        return h, self._mtp.norm(mtp_h), balance


class Losses(NamedTuple):
    """FP32 scalars, means over this rank's part of the batch. `total = main + lambda * mtp + balance`."""

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor


def losses_of(output: ModelOutput, windows: Tensor, config: TrainConfig) -> Losses:
    """Losses of what the model says to `windows[:, :-1]` (windows int64 [batch, seq_len + 2])."""
    assert output.mtp_logits is not None
    main = next_byte_loss(output.logits, windows[:, 1:-1])
    mtp = next_byte_loss(output.mtp_logits, windows[:, 2:])
    balance = config.balance_alpha * output.balance
    return Losses(main + config.mtp_lambda * mtp + balance, main, mtp, balance)


def next_byte_loss(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats; logits [batch, seq, VOCAB], targets int64 [batch, seq]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
