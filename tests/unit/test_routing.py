import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib import routing
from commlib.errors import ConfigError
from commlib.routing import GateConfig

quick = settings(deadline=None, max_examples=60)


@st.composite
def gates(draw: st.DrawFn) -> GateConfig:
    """Gates with equal or uneven groups that are always able to serve a token."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    max_groups = draw(st.integers(1, len(sizes)))
    num_topk = draw(st.integers(1, sum(sorted(sizes)[:max_groups])))
    of_expert = draw(st.permutations([group for group, size in enumerate(sizes) for _ in range(size)]))
    return GateConfig(
        num_experts=sum(sizes),
        num_topk=num_topk,
        max_groups=max_groups,
        group_of_expert=tuple(of_expert),
        score_function=draw(st.sampled_from(routing.SCORE_FUNCTIONS)),
        route_scale=draw(st.sampled_from([1.0, 2.5])),
    )


def grid_scores(config: GateConfig, seed: int, num_tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and bias in eighths: many ties, and sums that FP32 holds exactly in any order."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 8, (num_tokens, config.num_experts), generator=generator) / 8
    return scores, torch.randint(-8, 8, (config.num_experts,), generator=generator) / 8


def brute_force(scores: list[float], bias: list[float], config: GateConfig) -> list[int]:
    """All sets of groups, then all experts in them, by the definition."""
    biased = [s + b for s, b in zip(scores, bias, strict=True)]
    assert config.max_groups is not None
    num_summed = -(-config.num_topk // config.max_groups)
    group_score = [sum(sorted((biased[e] for e in members), reverse=True)[:num_summed]) for members in config.groups]
    # Greatest scores first, the lower group among equals: the largest tuple of (score, -group).
    best = max(
        itertools.combinations(range(config.num_groups), min(config.max_groups, config.num_groups)),
        key=lambda groups: sorted(((group_score[g], -g) for g in groups), reverse=True),
    )
    allowed = [e for g in best for e in config.groups[g]]
    return sorted(allowed, key=lambda e: (-biased[e], e))[: config.num_topk]


@quick
@given(gates(), st.integers(0, 2**31))
def test_selection_equals_brute_force(config: GateConfig, seed: int) -> None:
    scores, bias = grid_scores(config, seed)
    chosen = routing.select_experts(scores, config, bias)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == [brute_force(row, bias.tolist(), config) for row in scores.tolist()]


@quick
@given(gates(), st.integers(0, 2**31))
def test_gate_properties(config: GateConfig, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, config.num_experts, generator=generator)
    bias = torch.randn(config.num_experts, generator=generator)
    topk_idx, weights, scores = routing.gate(logits, config, bias)
    assert weights.dtype == torch.float32 and topk_idx.shape == weights.shape == (7, config.num_topk)
    of_expert = config.group_of_expert
    assert of_expert is not None and config.max_groups is not None
    for row in topk_idx.tolist():
        assert len(set(row)) == config.num_topk
        assert len({of_expert[e] for e in row}) <= config.max_groups
    # K quotients with 1 rounding each, K - 1 roundings in the divisor, 1 in the scale, and those of summing up here
    # in FP64 (none that count): relative error below (2K + 1) * 2^-24 to first order; K <= 16 makes 2K + 2 safe.
    bound = (2 * config.num_topk + 2) * 2.0**-24 * config.route_scale
    assert (weights.double().sum(1) - config.route_scale).abs().max() <= bound
    # The bias selects and nothing else: ratios of weights are those of the unbiased scores, and the same experts chosen
    # without a bias get the same weights.
    picked = scores.gather(1, topk_idx)
    assert torch.equal(weights, picked / picked.sum(1, keepdim=True) * config.route_scale)


@quick
@given(gates(), st.integers(0, 2**31))
def test_a_constant_bias_changes_nothing(config: GateConfig, seed: int) -> None:
    scores, _ = grid_scores(config, seed)
    # Without groups: where some hold fewer experts than are summed, a constant favours the larger ones by definition.
    config = GateConfig(num_experts=config.num_experts, num_topk=config.num_topk)
    constant = torch.full((config.num_experts,), 0.5)
    assert torch.equal(routing.select_experts(scores, config, constant), routing.select_experts(scores, config))


def test_v3_groups_by_hand() -> None:
    # 8 experts in 4 groups, 2 groups per token, 4 experts: group score = sum of the 2 best.
    config = GateConfig(num_experts=8, num_topk=4, num_groups=4, max_groups=2)
    scores = torch.tensor([[0.9, 0.0, 0.5, 0.5, 0.4, 0.4, 0.8, 0.3]])
    # Sums 0.9, 1.0, 0.8, 1.1: groups 3 and 1, although expert 0 is the best of all.
    assert routing.select_experts(scores, config).tolist() == [[6, 2, 3, 7]]
    # The bias lifts group 0 over group 1 and reorders the selection.
    bias = torch.tensor([0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert routing.select_experts(scores, config, bias).tolist() == [[0, 6, 7, 1]]


def test_ties_go_to_the_lower_expert() -> None:
    config = GateConfig(num_experts=64, num_topk=8)
    assert routing.select_experts(torch.zeros(3, 64), config).tolist() == [list(range(8))] * 3
    limited = GateConfig(num_experts=64, num_topk=8, num_groups=8, max_groups=2)
    assert routing.select_experts(torch.zeros(1, 64), limited).tolist() == [list(range(8))]
    values, indices = routing.topk(torch.tensor([1.0, 3.0, 3.0, 1.0, 3.0]), 4)
    assert values.tolist() == [3, 3, 3, 1] and indices.tolist() == [1, 2, 4, 0]


def test_minus_infinity_stays_inside_the_chosen_groups() -> None:
    config = GateConfig(num_experts=4, num_topk=2, num_groups=2, max_groups=1)
    bias = torch.tensor([0.0, 0.0, 0.0, float("-inf")])
    # Group 0 wins, since group 1 sums to -inf; then the choice must not leave it.
    assert routing.select_experts(torch.tensor([[0.1, 0.1, 0.9, 0.9]]), config, bias).tolist() == [[0, 1]]
    everywhere = torch.full((4,), float("-inf"))
    assert routing.select_experts(torch.zeros(1, 4), config, everywhere).tolist() == [[0, 1]]


def test_affinities() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.bfloat16)
    sigmoid = routing.affinity(logits, "sigmoid")
    assert sigmoid.dtype == torch.float32 and torch.equal(sigmoid, torch.sigmoid(logits.float()))
    assert torch.equal(routing.affinity(logits, "softmax"), torch.softmax(logits.float(), -1))
    with pytest.raises(ConfigError, match=r"score_function='tanh' is not one of sigmoid\|softmax"):
        routing.affinity(logits, "tanh")


def test_softmax_without_normalising_keeps_affinities() -> None:
    config = GateConfig(num_experts=6, num_topk=2, score_function="softmax", normalize=False, route_scale=2.0)
    out = routing.gate(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), config)
    assert torch.equal(out.topk_weights, out.scores.gather(1, out.topk_idx) * 2.0)


def test_all_zero_affinities_give_equal_weights_and_finite_gradients() -> None:
    config = GateConfig(num_experts=4, num_topk=2, route_scale=3.0)
    logits = torch.tensor([[-200.0] * 4, [0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    out = routing.gate(logits, config)
    assert out.topk_weights[0].tolist() == [1.5, 1.5]
    out.topk_weights[:, 0].sum().backward()
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())
    assert bool((logits.grad[0] == 0).all()) and bool((logits.grad[1, 2:] != 0).all())


def test_gradient_flows_through_selected_affinities_only() -> None:
    config = GateConfig(num_experts=5, num_topk=2, normalize=False)
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    bias = torch.zeros(5, requires_grad=True)
    out = routing.gate(logits, config, bias)
    out.topk_weights.sum().backward()
    assert logits.grad is not None and bias.grad is None
    expected = torch.zeros(3, 5).scatter_(1, out.topk_idx, 1.0)
    assert torch.equal(logits.grad != 0, expected != 0)


def test_normalised_gradient_matches_finite_differences() -> None:
    config = GateConfig(num_experts=6, num_topk=3, route_scale=2.5)
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), requires_grad=True)
    coefficients = torch.arange(12.0).reshape(4, 3)
    idx = routing.gate(logits, config).topk_idx
    (routing.gate(logits, config).topk_weights * coefficients).sum().backward()
    # By hand: w_k = c s_k / S, dw_k/ds_j = c (delta_kj - s_k / S) / S, ds/dlogit = s (1 - s); all in FP64.
    s = torch.sigmoid(logits.detach().double()).gather(1, idx)
    total = s.sum(1, keepdim=True)
    inner = (coefficients.double() * s / total).sum(1, keepdim=True)
    picked = 2.5 * (coefficients.double() - inner) / total * s * (1 - s)
    expected = torch.zeros(4, 6, dtype=torch.float64).scatter_(1, idx, picked)
    # FP32 against FP64: about 20 roundings of intermediates no larger than 2.5 * 11 * 2 = 55, so 20 * 55 * 2^-24.
    assert logits.grad is not None
    assert (logits.grad.double() - expected).abs().max() <= 20 * 55 * 2.0**-24


def test_no_tokens() -> None:
    config = GateConfig(num_experts=8, num_topk=2, num_groups=4, max_groups=2)
    out = routing.gate(torch.empty(0, 8), config)
    assert out.topk_idx.shape == out.topk_weights.shape == (0, 2)


def test_expert_load() -> None:
    load = routing.expert_load(torch.tensor([[0, 2], [2, -1], [-1, -1]]), 4)
    assert load.dtype == torch.int64 and load.tolist() == [1, 0, 2, 0]
    assert routing.expert_load(torch.empty(0, 2, dtype=torch.int64), 3).tolist() == [0, 0, 0]
    for wrong in (4, -2):
        with pytest.raises(ConfigError, match=f"topk_idx holds {wrong}, the rule"):
            routing.expert_load(torch.tensor([[0, wrong]]), 4)


def test_update_bias_moves_against_the_load() -> None:
    bias = torch.tensor([0.5, 0.5, 0.5, -0.5])
    moved = routing.update_bias(bias, torch.tensor([10, 0, 5, 5]), 0.25)
    assert moved.dtype == torch.float32 and moved.tolist() == [0.25, 0.75, 0.5, -0.5]
    assert bias.tolist() == [0.5, 0.5, 0.5, -0.5]
    # A mean that FP32 cannot hold: 2^25 + 1 against a mean of 2^25 + 1/2.
    close = routing.update_bias(torch.zeros(2), torch.tensor([2**25 + 1, 2**25]), 0.25)
    assert close.tolist() == [-0.25, 0.25]
    with pytest.raises(ConfigError, match="bfloat16"):
        routing.update_bias(bias.bfloat16(), torch.zeros(4), 0.1)
    with pytest.raises(ConfigError, match=r"load has shape \[3\], bias \[4\]"):
        routing.update_bias(bias, torch.zeros(3), 0.1)


def test_bias_updates_balance_a_skewed_gate() -> None:
    config = GateConfig(num_experts=8, num_topk=2)
    logits = torch.randn(512, 8, generator=torch.Generator().manual_seed(0)) + torch.linspace(-2, 2, 8)
    bias = torch.zeros(8)
    before = routing.expert_load(routing.gate(logits, config, bias).topk_idx, 8)
    for _ in range(200):
        bias = routing.update_bias(bias, routing.expert_load(routing.gate(logits, config, bias).topk_idx, 8), 0.01)
    after = routing.expert_load(routing.gate(logits, config, bias).topk_idx, 8)
    assert int(after.max()) * 2 < int(before.max()) and int(after.sum()) == 1024


def slow_balance_loss(scores: torch.Tensor, num_topk: int, alpha: float) -> float:
    """Equations 17 to 20 for one sequence, in Python floats."""
    rows = scores.double().tolist()
    num_experts, num_tokens = len(rows[0]), len(rows)
    loss = 0.0
    for i in range(num_experts):
        count = sum(i in sorted(range(num_experts), key=lambda e, row=row: (-row[e], e))[:num_topk] for row in rows)
        f = num_experts / (num_topk * num_tokens) * count
        loss += f * sum(row[i] / sum(row) for row in rows) / num_tokens
    return alpha * loss


@pytest.mark.parametrize("score_function", routing.SCORE_FUNCTIONS)
def test_sequence_balance_loss_equals_the_formula(score_function: str) -> None:
    # A group limit that would change the selection: the formula has none.
    config = GateConfig(num_experts=6, num_topk=2, num_groups=3, max_groups=1, score_function=score_function)
    logits = torch.randn(3 * 5, 6, generator=torch.Generator().manual_seed(2))
    scores = routing.affinity(logits, score_function)
    loss = routing.sequence_balance_loss(scores, config, seq_len=5, alpha=0.5)
    expected = sum(slow_balance_loss(part, 2, 0.5) for part in scores.split(5)) / 3
    # All terms are positive, so each rounding is relative to the result; a term sees about 5 (P) + 6 (its divisor) + 6
    # (experts) + 3 (sequences) + 6 (products and quotients) of them: 32 * 2^-24 is safe.
    assert loss.shape == () and abs(float(loss) - expected) <= expected * 32 * 2.0**-24


def test_sequence_balance_loss_is_least_when_balanced_and_has_gradients() -> None:
    config = GateConfig(num_experts=4, num_topk=1)
    balanced = torch.eye(4) * 0.5 + 0.25
    skewed = balanced[[0, 0, 0, 1]].clone().requires_grad_()
    even = routing.sequence_balance_loss(balanced, config, 4, 1.0)
    uneven = routing.sequence_balance_loss(skewed, config, 4, 1.0)
    assert float(even) == 1.0 < float(uneven.detach())
    uneven.backward()
    # Descent takes affinity from the crowded expert 0 and gives it to the idle experts.
    assert skewed.grad is not None
    assert bool((skewed.grad[:, 0] > 0).all()) and bool((skewed.grad[:, 2:] < 0).all())


def test_sequence_balance_loss_wants_whole_sequences() -> None:
    config = GateConfig(num_experts=4, num_topk=1)
    for num_tokens, seq_len in ((5, 2), (0, 2), (4, 0)):
        with pytest.raises(ConfigError, match=f"{num_tokens} tokens are not a whole number .* seq_len={seq_len}"):
            routing.sequence_balance_loss(torch.ones(num_tokens, 4), config, seq_len, 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_topk": 9}, r"num_topk=9 is not in 1\.\.num_experts=8"),
        ({"num_topk": 0}, r"num_topk=0 is not in 1\.\.num_experts=8"),
        ({"score_function": "relu"}, "score_function='relu'"),
        ({"num_groups": 3}, "num_experts=8 is not divisible by num_groups=3"),
        ({"num_groups": 4, "max_groups": 1, "num_topk": 3}, "max_groups=1 groups can hold only 2 experts"),
        ({"max_groups": 0}, "max_groups=0 is below 1"),
        ({"group_of_expert": (0, 0)}, "group_of_expert has 2 entries, num_experts=8"),
        ({"group_of_expert": (0, 0, 0, 0, 2, 2, 2, 2)}, r"names groups \[0, 2\]"),
        ({"group_of_expert": (0,) * 4 + (1,) * 4, "num_groups": 4}, "num_groups=4 contradicts the 2 groups"),
        ({"group_of_expert": (0,) * 7 + (1,), "max_groups": 1, "num_topk": 2}, "can hold only 1 experts"),
        ({"route_scale": 0.0}, r"route_scale=0\.0"),
        ({"route_scale": float("nan")}, "route_scale=nan"),
    ],
)
def test_bad_configs(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GateConfig(**{"num_experts": 8, "num_topk": 2, **arguments})  # type: ignore[arg-type]


def test_bad_shapes() -> None:
    config = GateConfig(num_experts=8, num_topk=2)
    with pytest.raises(ConfigError, match=r"logits has shape \[2, 7\], the rule: \[tokens, num_experts=8\]"):
        routing.gate(torch.zeros(2, 7), config)
    with pytest.raises(ConfigError, match=r"bias has shape \[7\]"):
        routing.gate(torch.zeros(2, 8), config, torch.zeros(7))
    with pytest.raises(ConfigError, match=r"k=9 is not in 0\.\.8"):
        routing.topk(torch.zeros(2, 8), 9)


def test_dispatch_layout_counts_tokens_once_per_rank() -> None:
    idx = torch.tensor([[0, 1], [5, 2], [-1, -1], [3, -1]])
    per_rank, per_expert, in_rank = routing.dispatch_layout(idx, 6, 3)
    assert per_rank.tolist() == [1, 2, 1] and per_expert.tolist() == [1, 1, 1, 1, 0, 1]
    assert in_rank.int().tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0], [0, 1, 0]]
    with pytest.raises(ConfigError, match="num_experts=6 is not divisible by num_ranks=4"):
        routing.dispatch_layout(idx, 6, 4)
