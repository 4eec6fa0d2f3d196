"""The gate as one kernel: what `commlib.routing.gate` computes, for CUDA tensors."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from commlib.cuda.driver import Kernel
from commlib.cuda.params import GateCall
from commlib.cuda.units import launch_on, load_on
from commlib.errors import ConfigError
from commlib.routing import GateConfig, GateOutput

__all__ = ["MAX_EXPERTS", "MAX_GROUPS", "MAX_TOPK", "fits", "fused_gate", "load_gate"]

MAX_EXPERTS = 1024
MAX_GROUPS = 32
MAX_TOPK = 32
_THREADS = {"gate_8": 1024, "gate_16": 512, "gate_32": 256}


@cache
def load_gate(device_index: int) -> dict[str, Kernel]:
    """The kernels on a device. Runtimes load them at construction: later the driver might wait for a kernel that waits
    for a peer."""
    return load_on(device_index, {"gate": dict.fromkeys(_THREADS, 0)})


@cache
def _groups_on(config: GateConfig, device_index: int) -> Any:
    groups = torch.empty(config.num_experts, dtype=torch.int32)
    for group, members in enumerate(config.groups):
        groups[list(members)] = group
    return groups.to(torch.device("cuda", device_index))


def _lanes_per_group(config: GateConfig, per_lane: int) -> int:
    """Lanes that hold one group each, a power of two; 0 if groups do not begin and end with lanes."""
    if config.group_of_expert is not None:
        return 0
    lanes, rest = divmod(config.num_experts // config.num_groups, per_lane)
    return lanes if rest == 0 and lanes > 0 and lanes & (lanes - 1) == 0 else 0


def fits(config: GateConfig) -> bool:
    """Whether the kernel serves a gate; if not, `commlib.routing.gate` does."""
    limits = (config.num_experts <= MAX_EXPERTS, config.num_topk <= MAX_TOPK, config.num_groups <= MAX_GROUPS)
    return all(limits) or (limits[0] and limits[1] and not config.is_limited)


def fused_gate(logits: Any, config: GateConfig, bias: Any = None, *, num_sms: int | None = None) -> GateOutput:
    """`commlib.routing.gate` with gradients, in one kernel on the current stream.

    Choices are the same wherever two biased affinities, or sums of a group's best, differ by more than rounding: the
    affinity is within 3 units in the last place of the exact one. Weights are within a few units of those of the
    composition of torch operations.

    Args:
        logits: [T, E] FP32 or BF16 on a CUDA device.
        config: a gate that `fits`.
        bias: FP32 [E] or None.
        num_sms: multiprocessors to use; None = all.

    Raises:
        ConfigError: a tensor of another device, dtype or shape.
    """
    if logits.ndim != 2 or logits.shape[1] != config.num_experts or logits.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(
            f"logits are {logits.dtype} {list(logits.shape)}, the rule: float32 or bfloat16 [tokens, "
            f"num_experts={config.num_experts}]"
        )
    if bias is not None and (tuple(bias.shape) != (config.num_experts,) or bias.device != logits.device):
        raise ConfigError(
            f"bias is {list(bias.shape)} on {bias.device}, the rule: [num_experts={config.num_experts}] on "
            f"{logits.device}"
        )
    idx, weights, scores = _Gate.apply(logits, bias, config, num_sms)  # type: ignore[no-untyped-call]
    return GateOutput(idx, weights, scores)


def _launch(logits: Any, config: GateConfig, bias: Any, num_sms: int | None) -> tuple[Any, Any, Any]:
    device, (num_tokens, num_experts) = logits.device, logits.shape
    idx = torch.empty(num_tokens, config.num_topk, dtype=torch.int64, device=device)
    weights = torch.empty(num_tokens, config.num_topk, dtype=torch.float32, device=device)
    scores = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=device)
    if num_tokens == 0:
        return idx, weights, scores
    max_groups = config.max_groups if config.is_limited and config.max_groups is not None else 0
    groups = _groups_on(config, device.index) if max_groups else None
    num_summed = -(-config.num_topk // max_groups) if max_groups else 0
    per_lane = 8 if num_experts <= 256 else 16 if num_experts <= 512 else 32
    name = f"gate_{per_lane}"
    call = GateCall(
        logits=logits.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        group_of_expert=0 if groups is None else groups.data_ptr(),
        topk_idx=idx.data_ptr(),
        topk_weights=weights.data_ptr(),
        scores=scores.data_ptr(),
        num_tokens=num_tokens,
        num_experts=num_experts,
        num_topk=config.num_topk,
        num_groups=config.num_groups,
        max_groups=max_groups,
        num_summed=num_summed,
        lanes_per_group=_lanes_per_group(config, per_lane) if num_summed <= 2 else 0,
        dtype=1 if logits.dtype == torch.bfloat16 else 0,
        is_softmax=config.score_function == "softmax",
        normalize=config.normalize,
        route_scale=config.route_scale,
    )
    threads = _THREADS[name]
    most = num_sms or torch.cuda.get_device_properties(device).multi_processor_count
    blocks = min(most, -(-num_tokens // (threads // 32)))
    launch_on(device.index, load_gate(device.index)[name], blocks, threads, 0, call)
    return idx, weights, scores


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Any, bias: Any, config: GateConfig, num_sms: int | None) -> tuple[Any, Any, Any]:
        own_bias = None if bias is None else bias.detach().float().contiguous()
        idx, weights, scores = _launch(logits.detach().contiguous(), config, own_bias, num_sms)
        ctx.config, ctx.dtype = config, logits.dtype
        ctx.save_for_backward(idx, scores)
        ctx.mark_non_differentiable(idx)
        return idx, weights, scores

    @staticmethod
    def backward(ctx: Any, _: Any, grad_weights: Any, grad_scores: Any) -> tuple[Any, None, None, None]:
        """Through the weights of the chosen experts and through the scores; choices and bias carry none."""
        config: GateConfig = ctx.config
        idx, scores = ctx.saved_tensors
        grad = torch.zeros_like(scores) if grad_scores is None else grad_scores.float().clone()
        if grad_weights is not None:
            chosen = scores.gather(1, idx)
            grad_chosen = grad_weights * config.route_scale
            if config.normalize:
                total = chosen.sum(dim=-1, keepdim=True)
                inner = (grad_chosen * chosen).sum(dim=-1, keepdim=True)
                safe = torch.where(total == 0, 1.0, total)
                # d(s_i / sum) = ds_i / sum - s_i dsum / sum^2; equal weights of an all-zero choice have none.
                grad_chosen = torch.where(total == 0, 0.0, grad_chosen / safe - inner / (safe * safe))
            grad.scatter_add_(1, idx, grad_chosen)
        if config.score_function == "sigmoid":
            grad_logits = grad * scores * (1.0 - scores)
        else:
            grad_logits = scores * (grad - (grad * scores).sum(dim=-1, keepdim=True))
        return grad_logits.to(ctx.dtype), None, None, None
