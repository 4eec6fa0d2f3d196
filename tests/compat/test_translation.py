"""The parts of the stand-in that translate, one process: events, settings, layouts, sizes, maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.compat.deep_ep import Buffer, Config, EventHandle, EventOverlap
from commlib.compat.deep_ep.low_latency import packed_exponents
from commlib.compat.deep_ep.routing_map import Lines, indices_to_map, most_experts, to_lines
from commlib.compat.deep_ep.rows import copied, plus_bias, resized, sent_back, split_scales
from commlib.compat.deep_ep.runtimes import _without_limit
from commlib.compat.deep_ep.utils.event import event_after, wait_for
from commlib.config import RuntimeConfig
from commlib.errors import ConfigError


class Recorded(EventHandle):
    """Counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def current_stream_wait(self) -> None:
        super().current_stream_wait()
        self.waits += 1


def test_events_on_the_cpu_are_over_at_once() -> None:
    assert EventHandle()._event is None
    event = Recorded()
    overlap = EventOverlap(event, (torch.ones(1),))
    with overlap as inside:
        assert inside is overlap and event.waits == 0
    assert event.waits == 1
    with overlap(release_handle=True):
        pass
    assert event.waits == 2 and overlap.event is None
    overlap.current_stream_wait()
    wait_for(None)
    wait_for(event)
    wait_for(EventOverlap(event))
    assert event.waits == 4
    assert event_after(False).event is None and isinstance(event_after(True).event, EventHandle)


def test_a_hook_runs_once_after_the_wait() -> None:
    order: list[str] = []
    overlap = EventOverlap(EventHandle())
    overlap.register_hook_after_wait(lambda: order.append("hook"))
    with pytest.raises(RuntimeError, match="has a hook already"):
        overlap.register_hook_after_wait(lambda: None)
    overlap.current_stream_wait()
    overlap.current_stream_wait()
    assert order == ["hook"]


def test_settings_are_kept() -> None:
    assert Config(24, 6, 256).num_max_nvl_chunked_recv_tokens == 256
    before = Buffer.num_sms
    try:
        Buffer.set_num_sms(12)
        config = Buffer.get_dispatch_config(7)
        assert config.num_sms == Buffer.get_combine_config(160).num_sms == 12
        assert config.get_nvl_buffer_size_hint(2048, 7) == config.get_rdma_buffer_size_hint(2048, 7) == 0
        with pytest.raises(ValueError, match="num_sms=3 is odd"):
            Buffer.set_num_sms(3)
    finally:
        Buffer.set_num_sms(before)
    with pytest.raises(ValueError, match="needs a group or a comm"):
        Buffer(None)


def test_runtimes_of_gpus_take_more_tokens_than_their_arena_is_sized_for() -> None:
    told = RuntimeConfig(hidden=256, num_experts=8, num_topk=2, max_tokens=100)
    config = _without_limit(told, 1, 4)
    assert config.max_tokens == 65536 and config.arena_bytes is not None
    # A balanced dispatch of the 100 tokens in FP32, in experts padded to 128, twice over; not one of 65536.
    assert 2 * 2 * 128 * 1024 < config.arena_bytes < 65536 * 1024
    told = RuntimeConfig(hidden=256, num_experts=8, num_topk=2, max_tokens=1 << 20, arena_bytes=1 << 20)
    assert (_without_limit(told, 1, 4).max_tokens, _without_limit(told, 1, 4).arena_bytes) == (1 << 20, 1 << 20)


def test_resized_rows() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert resized(rows, 2).tolist() == [[0, 1], [2, 3]]
    assert resized(rows, 2).data_ptr() == resized(rows, 3).data_ptr() == rows.data_ptr()
    assert resized(rows, 4, fill=-1).tolist()[3] == [-1, -1]
    fp8 = resized(rows.to(torch.float8_e4m3fn), 5)
    assert fp8.dtype == torch.float8_e4m3fn and fp8.float().tolist() == [[0, 1], [2, 3], [4, 5], [0, 0], [0, 0]]
    for count in (2, 3, 4):
        assert copied(rows, count).data_ptr() != rows.data_ptr()


def test_wrong_numbers_of_rows_stay_wrong() -> None:
    """They are the Runtime's to refuse, on all ranks."""
    rows = torch.ones(5, 2)
    assert sent_back(rows, 5, 3).shape == (3, 2)
    assert sent_back(rows, 5, 7).tolist()[5:] == [[0, 0], [0, 0]]
    assert sent_back(rows, 6, 3) is rows


def test_biases_are_summed_in_fp32() -> None:
    out, small = torch.full((1, 1), 256.0).bfloat16(), torch.full((1, 1), 0.6).bfloat16()
    assert plus_bias(out, None) is out
    # 256 + 0.6 rounds to 256 in BF16, whose step is 2 there; 256 + 1.2 to 258.
    assert plus_bias(out, small).item() == 256
    assert plus_bias(out, (small, small)).item() == 258


def test_scales_other_than_fp32_1x128_are_refused() -> None:
    q = torch.zeros(2, 256).to(torch.float8_e4m3fn)
    assert split_scales((q, torch.ones(2, 2)))[1] is not None
    for wrong in (torch.ones(2, 1), torch.ones(2, 2).int(), torch.ones(3, 2)):
        with pytest.raises(NotImplementedError, match="not torch"):
            split_scales((q, wrong))


def test_exponents_are_packed_lowest_first() -> None:
    scales = torch.tensor([[1.0, 2.0, 0.5, 2.0**-20]])
    packed = packed_exponents(scales)
    assert packed.dtype == torch.int32 and packed.shape == (1, 1)
    assert packed.item() == 127 | 128 << 8 | 126 << 16 | 107 << 24
    with pytest.raises(ConfigError, match="packs 4 scales"):
        packed_exponents(torch.ones(1, 6))


MAPS = st.integers(0, 6).flatmap(
    lambda tokens: st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=tokens, max_size=tokens)
)


@settings(max_examples=80, deadline=None)
@given(rows=MAPS, num_topk=st.integers(1, 5), seed=st.integers(0, 99))
def test_lines_hold_the_map(rows: list[list[bool]], num_topk: int, seed: int) -> None:
    routing_map = torch.tensor(rows, dtype=torch.bool).view(-1, 5)
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(routing_map.shape, generator=generator) * routing_map
    lines = to_lines(routing_map, probs, num_topk)
    token = torch.arange(len(rows)) if lines.token is None else lines.token
    assert (lines.token is None) == (most_experts(routing_map) <= num_topk)
    assert lines.topk_idx.shape[1] == num_topk and token.tolist() == sorted(token.tolist())
    found: list[list[int]] = [[] for _ in rows]
    for line, (owner, experts) in enumerate(zip(token.tolist(), lines.topk_idx.tolist(), strict=True)):
        found[owner] += [expert for expert in experts if expert >= 0]
        for slot, expert in enumerate(experts):
            assert lines.topk_weights is not None
            assert lines.topk_weights[line, slot] == (probs[owner, expert] if expert >= 0 else 0)
    assert found == [[expert for expert, is_set in enumerate(row) if is_set] for row in rows]
    assert lines.topk_weights is not None and torch.equal(lines.to_dense(lines.topk_weights), probs)
    x = torch.arange(len(rows)).float()[:, None]
    assert torch.equal(lines.spread(x)[:, 0], token.float())
    count = torch.bincount(token, minlength=len(rows))[:, None]
    assert torch.equal(lines.gather(lines.spread(x)), x * count)


def test_a_map_of_indices() -> None:
    idx, weights = torch.tensor([[2, -1], [0, 1]]), torch.tensor([[0.5, 9.0], [0.25, 1.0]])
    routing_map, probs = indices_to_map(idx, weights, 2, 3)
    assert routing_map.tolist() == [[False, False, True], [True, True, False]]
    assert probs is not None and probs.tolist() == [[0, 0, 0.5], [0.25, 1, 0]]
    assert indices_to_map(idx, None, 2, 3)[1] is None


def test_sums_of_lines_are_rounded_once() -> None:
    lines: Any = Lines(torch.zeros(3, 1, dtype=torch.int64), None, torch.tensor([0, 0, 0]), 1, 1)
    # One after another in BF16, both 0.6 would be lost next to 256.
    assert lines.gather(torch.tensor([[256.0], [0.6], [0.6]]).bfloat16()).item() == 258
