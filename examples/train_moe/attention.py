"""Multi-head latent attention: queries, keys and values pass through narrow bottlenecks.

DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.1. Inference would cache only the compressed keys and
values and the one rotary key that all heads share; position lives in separate dimensions because a rotation between the
up-projection and the dot product would keep the up-projection from being absorbed into the queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.moe_layer import Linear
from examples.train_moe.config import ModelConfig


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`, computed in FP32."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], same dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self._eps).to(x.dtype)


def rotate(x: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding: pair i of position t turns by `t * base^(-2i/dim)`.

    x [..., positions, dim] -> same shape and dtype; the two members of a pair sit dim/2 apart.
    """
    positions, dim = x.shape[-2:]
    frequency = base ** (-torch.arange(0, dim, 2, device=x.device) / dim)
    angle = torch.arange(positions, device=x.device)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


class MLA(nn.Module):
    """Causal multi-head latent attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, nope, rope, v = config.num_heads, config.nope_dim, config.rope_dim, config.v_dim
        self.num_heads, self.nope_dim, self.rope_dim, self.v_dim = heads, nope, rope, v
        self.kv_rank = config.kv_rank
        self.is_bf16 = config.bf16_attention
        self.q_down = Linear(config.hidden, config.q_rank)
        self.q_norm = RMSNorm(config.q_rank)
        self.q_up = Linear(config.q_rank, heads * (nope + rope))
        self.kv_down = Linear(config.hidden, config.kv_rank + rope)
        self.kv_norm = RMSNorm(config.kv_rank)
        self.kv_up = Linear(config.kv_rank, heads * (nope + v))
        self.out = Linear(heads * v, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden]; position t sees positions 0..t."""
        q = self._heads(self.q_up(self.q_norm(self.q_down(x))))
        q_nope, q_rope = torch.split(q, [self.nope_dim, self.rope_dim], dim=-1)

        compressed, k_rope = torch.split(self.kv_down(x), [self.kv_rank, self.rope_dim], dim=-1)
        kv = self._heads(self.kv_up(self.kv_norm(compressed)))
        k_nope, v = torch.split(kv, [self.nope_dim, self.v_dim], dim=-1)
        k_rope = rotate(k_rope)[:, None].expand(-1, self.num_heads, -1, -1)  # one rotary key for all heads

        q = torch.cat([q_nope, rotate(q_rope)], dim=-1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        y: Tensor = self.out(self._attend(q, k, v).transpose(1, 2).flatten(2))
        return y

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[batch, heads, seq, nope + rope] twice, and [batch, heads, seq, v], which is also the result's shape."""
        if not self.is_bf16:
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True).to(v.dtype)
        if self.v_dim < q.shape[-1]:  # flash attention wants one width for all three
            v = F.pad(v, (0, q.shape[-1] - self.v_dim))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)[..., : self.v_dim]

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, seq, heads * dim] -> [batch, heads, seq, dim]."""
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
