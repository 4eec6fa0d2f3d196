"""The parts of examples/train_moe that need no other rank."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.train_moe.attention import MLA, rotate
from examples.train_moe.bigram import bigram_loss, fit_bigram
from examples.train_moe.config import ModelConfig, ParallelConfig, TrainConfig
from examples.train_moe.data import Batches, held_out_windows, split_plays
from examples.train_moe.ema import Ema
from examples.train_moe.model import ModelOutput, losses_of
from examples.train_moe.mtp import MultiTokenPrediction
from examples.train_moe.optimizer import AdamW, clip_global_norm, learning_rate
from examples.train_moe.parallel import by_expert

BF16_ROUNDING = 2.0**-8  # relative, to nearest: 8 significant bits


def some_text(num_bytes: int = 500) -> Tensor:
    return torch.randint(256, (num_bytes,), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """torch.distributed with a single member."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in its __all__
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TestAdamW:
    STEPS = 40
    LR = 1e-2
    BETAS = (0.9, 0.95)

    def run_both(self, moment_dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """After every step on the same gradients: our weights, those of torch's AdamW, and its state."""
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(8, 16, generator=generator)
        ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
        optimizer = AdamW({"p": ours}, betas=self.BETAS, weight_decay=0.1, moment_dtype=moment_dtype)
        expected = torch.optim.AdamW([theirs], lr=self.LR, betas=self.BETAS, eps=1e-8, weight_decay=0.1, foreach=False)
        for _ in range(self.STEPS):
            ours.grad = torch.randn(start.shape, generator=generator)
            theirs.grad = ours.grad.clone()
            optimizer.step(self.LR)
            expected.step()
            yield ours.detach(), theirs.detach(), expected.state[theirs]

    def test_fp32_moments_match_torch(self) -> None:
        for ours, theirs, _ in self.run_both(torch.float32):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)

    def test_bf16_moments_stay_within_their_rounding(self) -> None:
        """To first order: a stored moment is off by `beta * (what it was off before) + u * |moment|`, u = 2^-8.

        The update `lr * m / sqrt(v)` sees the error before it is rounded again, that of v halved by the root. 10% more
        for the second order.
        """
        beta1, beta2 = self.BETAS
        first_error, second_error, bound = (torch.zeros(8, 16) for _ in range(3))
        for step, (ours, theirs, state) in enumerate(self.run_both(torch.bfloat16), start=1):
            first, second = state["exp_avg"], state["exp_avg_sq"]
            first_error, second_error = beta1 * first_error, beta2 * second_error
            scale = self.LR * math.sqrt(1 - beta2**step) / (1 - beta1**step) / second.sqrt()
            bound = bound + 1.1 * scale * (first_error + first.abs() * 0.5 * second_error / second)
            distance = (ours - theirs).abs()
            assert (distance <= bound + 1e-6).all()
            first_error += BF16_ROUNDING * first.abs()
            second_error += BF16_ROUNDING * second
        assert distance.max() > 1e-5, "the moments were rounded"
        assert bound.max() < 0.25 * self.STEPS * self.LR, "the bound is far below what the weights moved"

    def test_norm_gains_are_not_decayed(self) -> None:
        gain = nn.Parameter(torch.ones(4))
        gain.grad = torch.zeros(4)
        AdamW({"gain": gain}, weight_decay=0.5).step(lr=0.1)
        assert gain.tolist() == [1.0] * 4

    def test_moments_are_stored_in_bf16(self) -> None:
        optimizer = AdamW({"p": nn.Parameter(torch.ones(2, 2))})
        assert optimizer.first["p"].dtype == optimizer.second["p"].dtype == torch.bfloat16


def test_learning_rate_warms_up_and_falls() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, lr=1.0, final_lr=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert all(after <= before for before, after in itertools.pairwise(rates[10:]))
    assert rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


class TestClip:
    @pytest.mark.usefixtures("one_rank")
    def test_norm_is_that_of_all_gradients_together(self) -> None:
        dense, experts = [torch.randn(4, 3), torch.randn(5)], [torch.randn(2, 3, 3)]
        joined = torch.cat([grad.flatten() for grad in dense + experts])
        expected = float(joined.norm())
        before = [grad.clone() for grad in dense + experts]
        assert clip_global_norm(dense, experts, max_norm=0.5) == pytest.approx(expected)
        for grad, unclipped in zip(dense + experts, before, strict=True):
            torch.testing.assert_close(grad, unclipped * (0.5 / expected))

    @pytest.mark.usefixtures("one_rank")
    def test_small_gradients_are_left_alone(self) -> None:
        grad = torch.full((4,), 0.1)
        assert clip_global_norm([grad], [torch.zeros(1)], max_norm=1.0) == pytest.approx(0.2)
        assert torch.equal(grad, torch.full((4,), 0.1))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_dense_layers=3 is not in 0\.\.num_layers-1=2"):
        ModelConfig(num_layers=3, num_dense_layers=3)
    with pytest.raises(ValueError, match="overlap='some' is not none, batches or pairs"):
        ParallelConfig(overlap="some")
    with pytest.raises(ValueError, match="micro_batches=3 with overlap=batches"):
        ParallelConfig(overlap="batches", micro_batches=3)


class TestAttention:
    CONFIG = ModelConfig(hidden=32, num_heads=2, q_rank=16, kv_rank=8, nope_dim=8, rope_dim=4, v_dim=8)

    def test_later_positions_do_not_reach_earlier_ones(self) -> None:
        torch.manual_seed(0)
        attention = MLA(self.CONFIG)
        x = torch.randn(2, 12, 32)
        changed = x.clone()
        changed[:, 7:] = torch.randn(2, 5, 32)
        before, after = attention(x), attention(changed)
        torch.testing.assert_close(before[:, :7], after[:, :7])
        assert not torch.allclose(before[:, 7:], after[:, 7:])

    def test_rotation_makes_scores_depend_on_distance_only(self) -> None:
        torch.manual_seed(0)
        q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
        scores = rotate(q.expand(10, 8).float()) @ rotate(k.expand(10, 8).float()).T
        for distance in range(4):
            diagonal = scores.diagonal(-distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
        assert not torch.allclose(scores[0, 0], scores[5, 0])

    @pytest.mark.parametrize("bf16_attention", [False, True])
    def test_matches_attention_written_out(self, bf16_attention: bool) -> None:
        """All in FP32, which is what FP32 rows are attended to in either way."""
        torch.manual_seed(0)
        mla = MLA(dataclasses.replace(self.CONFIG, bf16_attention=bf16_attention))
        x = torch.randn(1, 6, 32)
        q = mla.q_up(mla.q_norm(mla.q_down(x))).view(6, 2, 12)
        down = mla.kv_down(x)
        kv = mla.kv_up(mla.kv_norm(down[..., :8])).view(6, 2, 16)
        heads = []
        for head in range(2):
            scores = q[:, head, :8] @ kv[:, head, :8].T + rotate(q[:, head, 8:]) @ rotate(down[0, :, 8:]).T
            scores = (scores / math.sqrt(12)).masked_fill(~torch.ones(6, 6).tril().bool(), -math.inf)
            heads.append(scores.softmax(-1) @ kv[:, head, 8:])
        torch.testing.assert_close(mla(x)[0], mla.out(torch.cat(heads, dim=-1)), rtol=1e-5, atol=1e-6)


class TestMultiTokenPrediction:
    def test_sees_the_next_byte_and_no_later_one(self) -> None:
        """Position t mixes the trunk's state at t with the embedding of t + 1."""
        torch.manual_seed(0)
        mtp = MultiTokenPrediction(8, nn.Identity())
        embedding = nn.Embedding(256, 8)
        tokens = torch.arange(10)[None]
        h = torch.randn(1, 9, 8)
        before = mtp.join(h, embedding(tokens)[:, 1:])
        tokens[0, 5] = 200
        after = mtp.join(h, embedding(tokens)[:, 1:])
        is_changed = (before != after).any(dim=-1)[0]
        assert is_changed.nonzero().flatten().tolist() == [4]

    def test_targets_are_two_bytes_ahead(self) -> None:
        """A model that knows the text, x[t] = t, is asked for t + 1 by its head and for t + 2 by the MTP module."""

        windows = torch.arange(2 * 10).view(2, 10)
        known = windows[:, :-2]

        def sure_of(targets: Tensor) -> Tensor:
            return 100.0 * nn.functional.one_hot(targets, 256).float()

        output = ModelOutput(sure_of(known + 1), sure_of(known + 2), torch.tensor(3.0))
        config = TrainConfig(seq_len=8, balance_alpha=0.5)
        losses = losses_of(output, windows, config)
        assert float(losses.main) < 1e-6
        assert float(losses.mtp) < 1e-6
        assert float(losses.balance) == 1.5
        assert float(losses.total) == pytest.approx(1.5)


class TestBigram:
    def test_matches_counting_by_hand(self) -> None:
        text = torch.tensor(list(b"abracadabra abracadabra"), dtype=torch.uint8)
        windows = held_out_windows(torch.tensor(list(b"abba cadabra"), dtype=torch.uint8), seq_len=4)
        k = 0.5
        nats = []
        for window in windows.tolist():
            for previous, following in itertools.pairwise(window):
                pairs = list(itertools.pairwise(text.tolist()))
                count = pairs.count((previous, following)) + k
                total = sum(pair[0] == previous for pair in pairs) + 256 * k
                nats.append(-math.log(count / total))
        assert bigram_loss(fit_bigram(text, k), windows) == pytest.approx(sum(nats) / len(nats))

    def test_rows_are_distributions(self) -> None:
        torch.testing.assert_close(fit_bigram(some_text()).exp().sum(dim=1), torch.ones(256, dtype=torch.float64))


class TestData:
    def test_global_batch_does_not_depend_on_the_number_of_ranks(self) -> None:
        def global_batches(num_ranks: int) -> list[Tensor]:
            parts = [
                Batches(some_text(), seq_len=8, global_batch=12, rank=rank, num_ranks=num_ranks, seed=5)
                for rank in range(num_ranks)
            ]
            return [torch.cat([part.next() for part in parts]) for _ in range(3)]

        expected = global_batches(1)
        assert expected[0].shape == (12, 10)
        assert not torch.equal(expected[0], expected[1])
        for num_ranks in (2, 4):
            for batch, other in zip(expected, global_batches(num_ranks), strict=True):
                assert torch.equal(batch, other)

    def test_windows_are_runs_of_the_text(self) -> None:
        text = torch.arange(200, dtype=torch.uint8)
        batch = Batches(text, seq_len=8, global_batch=64, rank=0, num_ranks=1, seed=0).next()
        assert torch.equal(batch - batch[:, :1], torch.arange(10).expand(64, 10))

    def test_goes_on_where_the_state_was_taken(self) -> None:
        batches = Batches(some_text(), seq_len=8, global_batch=4, rank=0, num_ranks=1, seed=5)
        batches.next()
        state = batches.state()
        expected = [batches.next() for _ in range(2)]
        other = Batches(some_text(), seq_len=8, global_batch=4, rank=0, num_ranks=1, seed=6)
        other.restore(state)
        assert all(torch.equal(batch, other.next()) for batch in expected)

    def test_uneven_batches_are_refused(self) -> None:
        with pytest.raises(ValueError, match="global_batch=6 is not divisible by num_ranks=4"):
            Batches(some_text(), seq_len=8, global_batch=6, rank=0, num_ranks=4, seed=0)

    def test_held_out_windows_predict_every_byte_once(self) -> None:
        windows = held_out_windows(torch.arange(26, dtype=torch.uint8), seq_len=5)
        assert windows[:, 1:].flatten().tolist() == list(range(1, 26))
        assert torch.equal(windows[:, 1:] - 1, windows[:, :-1])

    def test_the_held_out_play_is_not_trained_on(self) -> None:
        plays = {"a": torch.full((3,), 1), "b": torch.full((2,), 2), "c": torch.full((4,), 3)}
        training, held_out = split_plays(plays, held_out="b")
        assert training.tolist() == [1] * 3 + [3] * 4
        assert held_out.tolist() == [2, 2]


class TestEma:
    def test_equals_the_average_computed_in_line(self) -> None:
        torch.manual_seed(0)
        parameters = {"a": nn.Parameter(torch.randn(50, 40)), "b": nn.Parameter(torch.randn(7))}
        expected = {name: p.detach().clone() for name, p in parameters.items()}
        ema = Ema(parameters, decay=0.9)
        for _ in range(20):
            ema.wait()
            for name, parameter in parameters.items():
                parameter.data.add_(torch.randn_like(parameter))
                expected[name].lerp_(parameter.detach(), 1 - 0.9)
            ema.update()
        ema.wait()
        assert all(torch.equal(ema.average[name], expected[name]) for name in parameters)
        ema.close()

    def test_applied_gives_the_weights_back(self) -> None:
        parameter = nn.Parameter(torch.ones(3))
        ema = Ema({"p": parameter}, decay=0.5)
        parameter.data.fill_(2.0)
        ema.update()
        with ema.applied():
            assert parameter.tolist() == [1.5] * 3
        assert parameter.tolist() == [2.0] * 3
        ema.close()

    def test_without_decay_nothing_is_kept(self) -> None:
        parameter = nn.Parameter(torch.ones(3))
        ema = Ema({"p": parameter}, decay=0.0)
        parameter.data.fill_(2.0)
        ema.update()
        assert not ema.average
        with ema.applied():
            assert parameter.tolist() == [2.0] * 3
        ema.close()

    def test_errors_of_the_thread_come_out_of_wait(self) -> None:
        ema = Ema({"p": nn.Parameter(torch.ones(3))}, decay=0.5)
        ema.average["p"] = torch.ones(4)
        ema.update()
        with pytest.raises(RuntimeError, match="size"):
            ema.wait()
        ema.close()


def test_experts_are_named_by_their_global_number() -> None:
    stacked, dense = torch.arange(6).view(3, 2), torch.zeros(2)
    named = dict(by_expert({"moe.up": stacked, "norm": dense}, {"moe.up": 9}))
    assert list(named) == ["moe.up.9", "moe.up.10", "moe.up.11", "norm"]
    named["moe.up.10"].fill_(7)
    assert stacked.tolist() == [[0, 1], [7, 7], [4, 5]], "views, so that a checkpoint loads in place"
