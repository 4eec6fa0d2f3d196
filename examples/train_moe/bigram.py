"""The baseline: how well does the previous byte alone predict the next one?"""

from __future__ import annotations

import torch
from torch import Tensor

from examples.train_moe.config import VOCAB


def fit_bigram(text: Tensor, k: float = 0.1) -> Tensor:
    """Log-probabilities [previous, next] of adjacent bytes of `text` (uint8 [bytes]), add-k smoothed, float64."""
    pairs = text[:-1].long() * VOCAB + text[1:].long()
    counts = torch.bincount(pairs, minlength=VOCAB * VOCAB).view(VOCAB, VOCAB).double() + k
    return torch.log(counts / counts.sum(dim=1, keepdim=True))


def bigram_loss(log_probs: Tensor, windows: Tensor) -> float:
    """Mean nats per byte over bytes 1.. of each window; windows int64 [windows, seq_len + 1]."""
    return -float(log_probs[windows[:, :-1], windows[:, 1:]].mean())
