import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commlib.config import RuntimeConfig
from commlib.errors import ConfigError
from commlib.layout import (
    Layout,
    align_up,
    default_arena_bytes,
    expected_rows,
    format_bytes,
    grouped_offsets,
    num_scales,
    record_bytes,
    row_bytes,
)
from commlib.topology import Topology

CONFIG = RuntimeConfig(hidden=7168, num_experts=256, num_topk=8)


def test_layout_is_a_string() -> None:
    assert Layout("grouped") is Layout.GROUPED
    assert f"{Layout.ROWS}" == "rows" == Layout.ROWS
    with pytest.raises(ValueError, match="columns"):
        Layout("columns")


@given(st.integers(0, 10**12), st.integers(1, 10**6))
def test_align_up_is_the_smallest_multiple(value: int, alignment: int) -> None:
    aligned = align_up(value, alignment)
    assert aligned % alignment == 0 and 0 <= aligned - value < alignment


def test_sizes_by_hand() -> None:
    assert row_bytes(7168, 2) == 14336
    assert num_scales(7168) == 56
    assert record_bytes(8) == 112
    assert record_bytes(1) == 28


@given(st.lists(st.integers(0, 1000), max_size=16), st.integers(1, 256))
def test_grouped_offsets_hold_every_expert(counts: list[int], alignment: int) -> None:
    psum = grouped_offsets(counts, alignment)
    assert psum.dtype == np.int64 and psum.shape == (len(counts) + 1,) and psum[0] == 0
    for i, count in enumerate(counts):
        room = psum[i + 1] - psum[i]
        assert room % alignment == 0 and 0 <= room - count < alignment


def test_expected_rows() -> None:
    # 4096 tokens x 8 slots / 32 local experts = 1024 rows each, already aligned.
    assert expected_rows(CONFIG, 8, Layout.GROUPED) == 4096 * 8
    # 1 local expert: 4096 * 8 / 256 ranks * 256 sources.
    assert expected_rows(CONFIG, 256, Layout.GROUPED) == 4096 * 8
    assert expected_rows(CONFIG, 4, Layout.ROWS) == 4096 * 4
    assert expected_rows(CONFIG, 64, Layout.ROWS) == 4096 * 8
    small = RuntimeConfig(hidden=128, num_experts=4, num_topk=2, max_tokens=3, expert_alignment=16)
    # 6 slots over 2 local experts: 3 each, padded to 16.
    assert expected_rows(small, 2, Layout.GROUPED) == 32


def test_default_arena_bytes_by_hand() -> None:
    config = RuntimeConfig(hidden=128, num_experts=4, num_topk=2, max_tokens=100, expert_alignment=1)
    topology = Topology.uniform(4, 2)
    rows = 200 * (512 + 4)
    records = 200 * 40
    # 2 slots over 4 ranks: 1 falls on this node of 2 ranks; own tokens and those of 1 in-source.
    landing = 100 * 2 * 1 * (512 + 8)
    assert default_arena_bytes(config, topology, 0) == align_up(2 * (rows + records + landing), 4096)


def test_default_arena_bytes_respects_the_limit_and_grows_with_tokens() -> None:
    topology = Topology.uniform(8, 4)
    sizes = [
        default_arena_bytes(RuntimeConfig(hidden=256, num_experts=16, num_topk=2, max_tokens=n), topology, 3)
        for n in (1, 1000, 10000)
    ]
    assert sizes == sorted(set(sizes))
    limited = RuntimeConfig(hidden=7168, num_experts=256, num_topk=8, max_arena_bytes=12345)
    assert default_arena_bytes(limited, topology, 0) == 12345


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1536, "1.5 KiB"),
        (1023 * 1024, "0.999 MiB"),
        (64 * 2**30, "64 GiB"),
        (-2048, "-2 KiB"),
        (2**63, "8 EiB"),
    ],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_errors_name_value_and_rule() -> None:
    with pytest.raises(ConfigError, match="hidden=100 is not a positive multiple of scale_block=128"):
        num_scales(100)
    with pytest.raises(ConfigError, match="num_topk=0 is below 1"):
        record_bytes(0)
    with pytest.raises(ConfigError, match="alignment=0"):
        align_up(1, 0)
    with pytest.raises(ConfigError, match="hidden=0"):
        row_bytes(0, 2)
    with pytest.raises(ConfigError, match="num_experts=256 is not divisible by num_ranks=3"):
        expected_rows(CONFIG, 3, Layout.ROWS)
