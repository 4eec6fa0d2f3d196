"""The training loop: one global batch per step, the same numbers whatever the number of ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import commlib
from commlib import bootstrap, routing
from examples.train_moe.config import ModelConfig, TrainConfig
from examples.train_moe.data import Batches
from examples.train_moe.ema import Ema
from examples.train_moe.model import Transformer, next_byte_loss, training_losses
from examples.train_moe.optimizer import AdamW, clip_global_norm, learning_rate
from examples.train_moe.parallel import all_reduce_gradients, expert_parameters, initialise


class StepReport(NamedTuple):
    """One step, over the whole global batch. `load` int64 [MoE layers, experts] counts tokens per expert."""

    step: int
    main: float
    mtp: float
    balance: float
    grad_norm: float
    seconds: float
    load: Tensor

    @property
    def max_violation(self) -> float:
        """`max load / mean load - 1`, averaged over the MoE layers: 0 is perfect balance."""
        load = self.load.double()
        return float((load.amax(dim=1) / load.mean(dim=1) - 1).mean())


class Trainer:
    """Model, optimizer, average and data of one rank.

    How gradients come to be those of the mean over the global batch: each rank differentiates its own mean divided by
    the number of ranks. Dense gradients are then summed by an all-reduce. Expert gradients need nothing more: the
    backward pass of combine brings the contributions of all ranks' tokens to the rank of the expert, and they add up
    in the expert's own matmul.
    """

    def __init__(
        self,
        ranks: bootstrap.Bootstrap,
        model_config: ModelConfig,
        config: TrainConfig,
        text: Tensor,
        compute_dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.num_ranks = ranks.size
        self.batches = Batches(
            text,
            seq_len=config.seq_len,
            global_batch=config.global_batch,
            rank=ranks.rank,
            num_ranks=ranks.size,
            seed=config.seed,
        )
        self.runtime = commlib.Runtime(
            ranks,
            commlib.RuntimeConfig(
                hidden=model_config.hidden,
                num_experts=model_config.num_experts,
                num_topk=model_config.num_topk,
                max_tokens=config.global_batch // ranks.size * config.seq_len,
                expert_alignment=32,
            ),
        )
        self.model = Transformer(model_config, self.runtime, compute_dtype)
        initialise(self.model, config.seed)
        self.first_expert = expert_parameters(self.model)
        parameters = dict(self.model.named_parameters())
        self._experts = [p for name, p in parameters.items() if name in self.first_expert]
        self._dense = [p for name, p in parameters.items() if name not in self.first_expert]
        betas = (config.beta1, config.beta2)
        self.optimizer = AdamW(parameters, betas=betas, weight_decay=config.weight_decay)
        self.ema = Ema(parameters, config.ema_decay)

    def train(self, until_step: int) -> Iterator[StepReport]:
        """Steps until `until_step` steps have been made."""
        while self.optimizer.num_steps < until_step:
            yield self._step()

    def _step(self) -> StepReport:
        started = time.perf_counter()
        losses, load = training_losses(self.model, self.batches.next(), self.config)
        self.model.zero_grad()
        torch.autograd.backward(losses.total / self.num_ranks)
        dense_grads, expert_grads = _gradients(self._dense), _gradients(self._experts)
        all_reduce_gradients(dense_grads)
        norm = clip_global_norm(dense_grads, expert_grads, self.config.clip_norm)

        step = self.optimizer.num_steps
        self.ema.wait()
        self.optimizer.step(learning_rate(step, self.config))
        self.ema.update()

        self._balance(load)
        means = torch.stack([losses.main, losses.mtp, losses.balance]).detach().double() / self.num_ranks
        dist.all_reduce(means)
        main, mtp, balance = means.tolist()
        return StepReport(step, main, mtp, balance, norm, time.perf_counter() - started, load)

    def _balance(self, load: Tensor) -> None:
        """Moves every gate's bias by the load of the global batch, int64 [MoE layers, experts]."""
        for layer, layer_load in zip(self.model.moe_layers(), load, strict=True):
            layer.bias.copy_(routing.update_bias(layer.bias, layer_load, self.config.bias_rate))

    @torch.no_grad()
    def held_out_loss(self, windows: Tensor) -> float:
        """Mean nats per byte of `windows` (int64 [windows, seq_len + 1]), which are shared out among the ranks.

        All ranks make the same number of forward passes; windows that fill up the last round do not count.
        """
        batch = self.config.global_batch // self.num_ranks
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(windows), self.config.global_batch):
            mine = start + dist.get_rank() * batch + torch.arange(batch)
            is_real = mine < len(windows)
            tokens = windows[mine.clamp(max=len(windows) - 1)]
            logits = self.model(tokens, with_mtp=False).logits
            nats = next_byte_loss(logits, tokens[:, 1:], reduction="none").view(batch, -1)
            total += nats[is_real].double().sum()
        dist.all_reduce(total)
        return float(total) / windows[:, 1:].numel()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the average's thread and the runtime: together with the other ranks, or at once after an error."""
        try:
            self.ema.close()
        finally:
            self.runtime.__exit__(kind, error, trace)


def _gradients(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """The gradients of `parameters`; a missing one is zero (on a rank whose experts no token chose)."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
