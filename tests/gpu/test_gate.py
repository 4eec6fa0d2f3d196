"""The gate kernel against commlib.routing on the very scores that the kernel gives, and those against FP64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from commlib import ops, routing
from commlib.routing import GateConfig

pytestmark = pytest.mark.gpu

CONFIGS = [
    GateConfig(num_experts=256, num_topk=8, num_groups=8, max_groups=4, route_scale=2.5),
    GateConfig(num_experts=256, num_topk=8),
    GateConfig(num_experts=40, num_topk=3, normalize=False),
    GateConfig(num_experts=64, num_topk=6, score_function="softmax", num_groups=4, max_groups=3),
    GateConfig(num_experts=320, num_topk=8, num_groups=10, max_groups=4),
    GateConfig(num_experts=12, num_topk=4, max_groups=2, group_of_expert=(0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2)),
    GateConfig(num_experts=1000, num_topk=32),
]


def make(config: GateConfig, num_tokens: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, config.num_experts, generator=generator) * 2
    bias = torch.randn(config.num_experts, generator=generator) / 20
    return logits.to(dtype).cuda(), bias.cuda()


def check_choice(config: GateConfig, got: routing.GateOutput, bias: Tensor | None) -> None:
    """Same scores, same choice: to the last tie."""
    expected = routing.select_experts(got.scores.cpu(), config, None if bias is None else bias.cpu())
    assert torch.equal(got.topk_idx.cpu(), expected)
    chosen = got.scores.detach().double().gather(1, got.topk_idx)
    if config.normalize:
        chosen = chosen / chosen.sum(dim=1, keepdim=True)
    # A sum of K terms, a quotient and a product: at most K + 2 roundings, half a unit each.
    bound = (config.num_topk + 2) * 2.0**-24 * chosen * config.route_scale
    assert bool(((got.topk_weights.double() - chosen * config.route_scale).abs() <= bound).all())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_choices_and_weights(config: GateConfig, dtype: torch.dtype, has_bias: bool) -> None:
    for num_tokens in (1, 37, 4096):
        logits, bias = make(config, num_tokens, dtype, num_tokens)
        got = ops.gate(logits, config, bias if has_bias else None)
        check_choice(config, got, bias if has_bias else None)
        exact = routing.affinity(logits.double(), "sigmoid") if config.score_function == "sigmoid" else None
        exact = torch.sigmoid(logits.double()) if exact is not None else torch.softmax(logits.double(), dim=-1)
        # expf errs by 2 units at most (CUDA C++ programming guide); softmax adds a sum of E terms.
        units = 4 if config.score_function == "sigmoid" else 6 + config.num_experts
        assert bool(((got.scores.double() - exact).abs() <= units * 2.0**-24 * exact).all())


def test_ties_nan_and_nothing() -> None:
    config = GateConfig(num_experts=256, num_topk=8, num_groups=8, max_groups=4)
    equal = torch.zeros(5, 256, device="cuda")
    assert ops.gate(equal, config).topk_idx.tolist() == [list(range(8))] * 5
    quantized = torch.randint(-2, 3, (300, 256), generator=torch.Generator().manual_seed(1)).float().cuda()
    check_choice(config, ops.gate(quantized, config), None)
    quantized[7, 100] = torch.nan
    assert 100 in ops.gate(quantized, GateConfig(num_experts=256, num_topk=8)).topk_idx[7].tolist()
    assert ops.gate(equal[:0], config).topk_idx.shape == (0, 8)


def test_few_multiprocessors_give_the_same() -> None:
    config = CONFIGS[0]
    logits, bias = make(config, 1000, torch.float32, 3)
    for every, few in zip(ops.gate(logits, config, bias), ops.gate(logits, config, bias, num_sms=2), strict=True):
        assert torch.equal(every, few)


@pytest.mark.parametrize("config", CONFIGS[:4])
def test_gradients(config: GateConfig) -> None:
    """Against the same formulas in FP64, for the choices of the kernel."""
    logits, bias = make(config, 64, torch.float32, 5)
    ours = logits.clone().requires_grad_()
    got = ops.gate(ours, config, bias)
    generator = torch.Generator().manual_seed(6)
    grad_weights = torch.randn(got.topk_weights.shape, generator=generator).cuda()
    grad_scores = torch.randn(got.scores.shape, generator=generator).cuda()
    torch.autograd.backward([got.topk_weights, got.scores], [grad_weights, grad_scores])
    exact = logits.double().clone().requires_grad_()
    scores = torch.sigmoid(exact) if config.score_function == "sigmoid" else torch.softmax(exact, dim=-1)
    weights = scores.gather(1, got.topk_idx)
    if config.normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    torch.autograd.backward([weights * config.route_scale, scores], [grad_weights.double(), grad_scores.double()])
    assert ours.grad is not None and exact.grad is not None
    # Sums of up to E + K rounded terms; the largest term of a token bounds each.
    scale = exact.grad.abs().amax(dim=1, keepdim=True) + grad_scores.double().abs().amax(dim=1, keepdim=True)
    bound = (config.num_experts + config.num_topk + 8) * 2.0**-24 * scale
    assert bool(((ours.grad.double() - exact.grad).abs() <= bound).all())
