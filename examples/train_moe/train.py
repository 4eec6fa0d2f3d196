"""The training loop: one global batch per step, the same numbers whatever the number of ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import commlib
from commlib import bootstrap, routing
from commlib.experts import keep_weight_casts
from commlib.testing.torch_exchange import TorchExchange
from examples.train_moe.config import ModelConfig, ParallelConfig, TrainConfig
from examples.train_moe.data import Batches
from examples.train_moe.ema import Ema
from examples.train_moe.faults import as_fault
from examples.train_moe.micro_batches import add_gradients
from examples.train_moe.model import Losses, Transformer, next_byte_loss
from examples.train_moe.optimizer import AdamW, clip_global_norm, learning_rate
from examples.train_moe.parallel import (
    Grid,
    all_reduce_gradients,
    expert_parameters,
    hold_gradients,
    initialise,
    local,
    reduce_gradients,
    shard_dense,
)
from examples.train_moe.torch_layer import run_layer_with_torch


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
    the number of ranks, and all contributions are summed (see `parallel`).
    """

    def __init__(
        self,
        ranks: bootstrap.Bootstrap,
        model_config: ModelConfig,
        config: TrainConfig,
        text: Tensor,
        compute_dtype: torch.dtype,
        parallel: ParallelConfig | None = None,
        device: str = "cpu",
    ) -> None:
        parallel = ParallelConfig() if parallel is None else parallel
        self.config, self.parallel = config, parallel
        self.num_ranks = ranks.size
        local_batch = config.global_batch // ranks.size
        if local_batch % parallel.micro_batches:
            raise ValueError(
                f"{local_batch} sequences per rank are not divisible by micro_batches={parallel.micro_batches}"
            )
        self.batches = Batches(
            text,
            seq_len=config.seq_len,
            global_batch=config.global_batch,
            rank=ranks.rank,
            num_ranks=ranks.size,
            seed=config.seed,
        )
        self.grid = Grid(ranks, parallel, torch.device(device))
        self.runtime = commlib.Runtime(
            self.grid.experts_group(),
            commlib.RuntimeConfig(
                hidden=model_config.hidden,
                num_experts=model_config.num_experts,
                num_topk=model_config.num_topk,
                max_tokens=local_batch * config.seq_len,
                expert_alignment=model_config.expert_alignment,
                num_sms=parallel.num_sms,
            ),
            device=device,
        )
        with torch.device(device):
            self.model = Transformer(model_config, self.runtime, compute_dtype)
        if parallel.exchange == "torch":
            if model_config.fp8_experts:
                raise ValueError("exchange=torch moves no FP8 rows")
            alignment = model_config.expert_alignment
            exchange = TorchExchange(self.grid.row_group(), model_config.num_experts, alignment)
            self.model.run_layer = partial(run_layer_with_torch, exchange)
        initialise(self.model, config.seed, on_device=config.draw_on_device)
        self._sharded_units = shard_dense(self.model, self.grid.mesh) if parallel.shard_dense else []
        self.first_expert = expert_parameters(self.model)
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        betas = (config.beta1, config.beta2)
        self.optimizer = AdamW(self.parameters, betas=betas, weight_decay=config.weight_decay)
        self.ema = Ema(self.parameters, config.ema_decay)

    def train(self, until_step: int) -> Iterator[StepReport]:
        """Steps until `until_step` steps have been made."""
        while self.optimizer.num_steps < until_step:
            with self._traced("step", f"step {self.optimizer.num_steps}"):
                report = self._step()
            yield report

    def _traced(self, kind: str, name: str) -> AbstractContextManager[None]:
        """A step or a piece of computation, if a trace is being taken."""
        trace = self.runtime.trace
        if trace is None:
            return nullcontext()
        return trace.step(name) if kind == "step" else trace.compute(name)

    def _step(self) -> StepReport:
        started = time.perf_counter()
        self._take_load()
        losses = self.add_gradients()
        norm = self._reduce_and_clip()

        step = self.optimizer.num_steps
        with self._traced("compute", "optimizer"):
            self.ema.wait()
            self.optimizer.step(learning_rate(step, self.config))
        self.ema.update()

        load = self._take_load()
        self._balance(load)
        values = torch.stack([torch.stack([each.main, each.mtp, each.balance]) for each in losses])
        means = values.double().sum(dim=0).cpu() / (len(losses) * self.num_ranks)
        dist.all_reduce(means)
        main, mtp, balance = means.tolist()
        return StepReport(step, main, mtp, balance, norm, time.perf_counter() - started, load)

    def add_gradients(self) -> list[Losses]:
        """Forward and backward passes on the next batch; gradients are those of this rank, not yet summed."""
        count = self.parallel.micro_batches
        batches = self.batches.next().to(self.grid.device).chunk(count)
        for parameter in self.parameters.values():
            parameter.grad = None
        hold_gradients(self._sharded_units)
        scale = 1 / (count * self.num_ranks)
        with self._traced("compute", "forward, backward"), keep_weight_casts():
            losses = add_gradients(self.model, batches, self.config, scale=scale, way=self.parallel.overlap)
        reduce_gradients(self._sharded_units)
        return losses

    def _reduce_and_clip(self) -> float:
        """Sums all gradients that are not yet summed; returns their norm before clipping."""
        whole: list[Tensor] = []
        sharded: list[Tensor] = []
        experts: list[Tensor] = []
        for name, parameter in self.parameters.items():
            if parameter.grad is None:  # on a rank whose experts no token chose
                parameter.grad = torch.zeros_like(parameter)
            is_sharded = local(parameter) is not parameter
            kind = experts if name in self.first_expert else sharded if is_sharded else whole
            kind.append(local(parameter.grad))
        all_reduce_gradients(whole)
        if self.grid.num_rows > 1:
            all_reduce_gradients(experts, self.grid.column_group())
        return clip_global_norm(whole, sharded + experts, self.config.clip_norm, self.grid.row_group())

    def _take_load(self) -> Tensor:
        """Tokens per expert since the last call, over all ranks: int64 [MoE layers, experts]."""
        layers = self.model.moe_layers()
        load = torch.stack([layer.load for layer in layers])
        for layer in layers:
            layer.load = torch.zeros_like(layer.load)
        if self.grid.num_rows > 1:
            dist.all_reduce(load, group=self.grid.column_group(is_host=True))
        return load

    def _balance(self, load: Tensor) -> None:
        """Moves every gate's bias by the load of the global batch, int64 [MoE layers, experts]."""
        for layer, layer_load in zip(self.model.moe_layers(), load.to(self.grid.device), strict=True):
            layer.bias.copy_(routing.update_bias(layer.bias, layer_load, self.config.bias_rate))

    @torch.no_grad()
    def held_out_loss(self, windows: Tensor) -> float:
        """Mean nats per byte of `windows` (int64 [windows, seq_len + 1]), which are shared out among the ranks.

        All ranks make the same number of forward passes; windows that fill up the last round do not count.
        """
        batch = self.config.global_batch // self.num_ranks
        total = torch.zeros((), dtype=torch.float64)
        device = self.grid.device
        for start in range(0, len(windows), self.config.global_batch):
            mine = start + dist.get_rank() * batch + torch.arange(batch)
            is_real = mine < len(windows)
            tokens = windows[mine.clamp(max=len(windows) - 1)].to(device)
            logits = self.model(tokens, with_mtp=False).logits
            nats = next_byte_loss(logits, tokens[:, 1:], reduction="none").view(batch, -1)
            total += nats[is_real.to(device)].double().sum().cpu()
        dist.all_reduce(total)
        return float(total) / windows[:, 1:].numel()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the average's thread and the runtime: together with the other ranks, or at once after an error.

        Raises:
            PeerLostError, CommTimeout, TransportError: a rank is lost, and torch.distributed was the first to notice.
        """
        fault = None if error is None else as_fault(error, self.runtime)
        try:
            self.ema.close()
        finally:
            self.runtime.__exit__(kind, error, trace)
        if fault is not None:
            raise fault from error
