"""AdamW with BF16 moments and FP32 masters, the learning-rate schedule, and clipping by the global norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from examples.train_moe.config import TrainConfig
from examples.train_moe.parallel import local


class AdamW:
    """Decoupled weight decay (arXiv 1711.05101) on parameters of two and more dimensions.

    The parameters are the FP32 masters: layers cast them when they use them. Of sharded ones, each rank updates its
    part, and holds the moments of that part. Moments are stored in `moment_dtype` and
    updated in FP32. BF16 keeps 8 significant bits, which is enough here because an update changes the first moment by
    up to 10% (beta1 0.9) and the second by up to 5% (beta2 0.95), well above the 0.8% between neighbouring BF16 values;
    with beta2 0.999 the second moment would stop moving.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moment_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self._parameters = parameters
        self._betas = betas
        self._eps = eps
        self._weight_decay = weight_decay
        self.num_steps = 0
        self.first = {name: torch.zeros_like(local(p), dtype=moment_dtype) for name, p in parameters.items()}
        self.second = {name: torch.zeros_like(local(p), dtype=moment_dtype) for name, p in parameters.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with each parameter's `grad`."""
        self.num_steps += 1
        beta1, beta2 = self._betas
        first_correction = 1 - beta1**self.num_steps
        second_correction = math.sqrt(1 - beta2**self.num_steps)
        for name, held in self._parameters.items():
            assert held.grad is not None, f"{name} has no gradient"
            parameter, grad = local(held), local(held.grad)
            first = self.first[name].float().lerp_(grad, 1 - beta1)
            second = self.second[name].float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            self.first[name].copy_(first)
            self.second[name].copy_(second)
            if parameter.ndim >= 2:
                parameter.mul_(1 - lr * self._weight_decay)
            denominator = second.sqrt().div_(second_correction).add_(self._eps)
            parameter.addcdiv_(first, denominator, value=-lr / first_correction)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from `lr` to `final_lr` at the last step. `step` counts from 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def clip_global_norm(
    whole: Iterable[Tensor], parts: Iterable[Tensor], max_norm: float, group: dist.ProcessGroup | None = None
) -> float:
    """Scales all gradients so that the norm of the whole model's gradient is at most `max_norm`.

    Args:
        whole: gradients that every rank holds alike: they count once.
        parts: gradients of which each rank of the group holds a part, experts or shards: their squares are summed.
        max_norm: the limit.
        group: the ranks that hold one model together; None: all.

    Returns:
        The norm before clipping, the same on all ranks.
    """
    whole, parts = list(whole), list(parts)
    squares = torch.stack([torch.linalg.vector_norm(grad.double()) ** 2 for grad in parts]).sum()
    dist.all_reduce(squares, group=group)
    squares += torch.stack([torch.linalg.vector_norm(grad.double()) ** 2 for grad in whole]).sum()
    norm = math.sqrt(float(squares))
    if norm > max_norm:
        for grad in whole + parts:
            grad.mul_(max_norm / norm)
    return norm
