import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from commlib.errors import ConfigError
from commlib.testing.payloads import assert_identity, decode, identity_payload, identity_rows, random_payload

DTYPES = [torch.bfloat16, torch.float32]
CELL = {torch.bfloat16: 8, torch.float32: 4}
SOURCE = torch.tensor([[0, 0], [3, 200], [-1, -1], [1, 127], [1, 128]])

dtypes = st.sampled_from(DTYPES)
ranks = st.integers(0, 2**14 - 1)
tokens = st.integers(0, 2**21 - 1)
quick = settings(deadline=None, max_examples=60)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [8, 13, 64, 7168])
def test_intact_rows_pass_and_decode(dtype: torch.dtype, hidden: int) -> None:
    rows = identity_rows(SOURCE, hidden, dtype)
    assert rows.shape == (5, hidden) and rows.dtype == dtype
    assert_identity(rows, SOURCE)
    found = decode(rows)
    assert found.rank.shape == found.token.shape == (5, hidden // CELL[dtype])
    assert bool((found.rank == SOURCE[:, 0:1]).all()) and bool((found.token == SOURCE[:, 1:2]).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_payload_is_the_rows_of_a_rank(dtype: torch.dtype) -> None:
    rows = identity_payload(5, 300, 16, dtype)
    assert_identity(rows, torch.stack([torch.full((300,), 5), torch.arange(300)], dim=1))
    assert identity_payload(5, 0, 16, dtype).shape == (0, 16)


@quick
@given(dtypes, ranks, tokens)
def test_values_are_exact_integers_and_no_column_is_zero(dtype: torch.dtype, rank: int, token: int) -> None:
    row = identity_rows(torch.tensor([[rank, token]]), 64, dtype).double()
    assert torch.equal(row, row.round()) and bool((row >= 1).all())
    assert (int(decode(row.to(dtype)).rank[0, 0]), int(decode(row.to(dtype)).token[0, 7])) == (rank, token)


@quick
@given(dtypes, ranks, tokens, ranks, tokens, st.integers(0, 7), st.integers(1, 8))
def test_any_torn_16_bytes_are_detected(
    dtype: torch.dtype, rank: int, token: int, other_rank: int, other_token: int, first: int, length: int
) -> None:
    expected = torch.tensor([[rank, token]])
    torn = identity_rows(expected, 64, dtype)
    width = CELL[dtype]
    part = slice(first * width, (first + length) * width)
    torn[:, part] = identity_rows(torch.tensor([[other_rank, other_token]]), 64, dtype)[:, part]
    if (rank, token) == (other_rank, other_token):
        assert_identity(torn, expected)
    else:
        with pytest.raises(AssertionError, match=f"hold rank {other_rank} token {other_token}"):
            assert_identity(torn, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swapped_rows_are_detected_and_named(dtype: torch.dtype) -> None:
    rows = identity_rows(SOURCE, 64, dtype)
    for a, b in itertools.combinations(range(5), 2):
        swapped = rows.clone()
        swapped[[a, b]] = rows[[b, a]]
        with pytest.raises(AssertionError, match=r"^2 of 5 rows are wrong") as caught:
            assert_identity(swapped, SOURCE)
        assert [line.split(",")[0] for line in str(caught.value).splitlines()[1:]] == [f"  row {a}", f"  row {b}"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_shifted_inside_the_row_are_detected(dtype: torch.dtype) -> None:
    rows = identity_rows(SOURCE[:2], 64, dtype)
    for shift in range(1, 64):
        with pytest.raises(AssertionError, match="2 of 2 rows are wrong"):
            assert_identity(rows.roll(shift, dims=1), SOURCE[:2])
    assert bool((decode(rows.roll(CELL[dtype], dims=1)).rank == -1).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), 0.5, 100.0])
def test_every_single_column_is_checked(dtype: torch.dtype, value: float) -> None:
    # 13 columns end in a cell that is cut short.
    source = SOURCE[1:2]
    intact = identity_rows(source, 13, dtype)
    for column in range(13):
        broken = intact.clone()
        assert float(broken[0, column]) != value
        broken[0, column] = value
        with pytest.raises(AssertionError, match="row 0, expected rank 3 token 200: columns"):
            assert_identity(broken, source)


def test_the_check_digit_finds_any_changed_digit() -> None:
    intact = identity_rows(SOURCE[1:2], 8, torch.bfloat16)
    for column in range(8):
        for digit in range(1, 129):
            changed = intact.clone()
            changed[0, column] = digit
            is_same = float(intact[0, column]) == digit
            assert (int(decode(changed).rank[0, 0]) == 3) == is_same


@pytest.mark.parametrize("dtype", DTYPES)
def test_dirty_padding_and_unwritten_rows_are_detected(dtype: torch.dtype) -> None:
    rows = identity_rows(SOURCE, 16, dtype)
    dirty = rows.clone()
    dirty[2, 15] = -0.0
    with pytest.raises(AssertionError, match=r"row 2, expected padding \(zeros\): columns .*15 hold zeros"):
        assert_identity(dirty, SOURCE)
    dirty[2] = rows[3]
    with pytest.raises(AssertionError, match=r"expected padding \(zeros\): columns 0\.\.15 hold rank 1 token 127"):
        assert_identity(dirty, SOURCE)
    unwritten = rows.clone()
    unwritten[1] = 0
    with pytest.raises(AssertionError, match=r"row 1, expected rank 3 token 200: columns 0\.\.15 hold zeros"):
        assert_identity(unwritten, SOURCE)


def test_messages_stay_short() -> None:
    source = torch.stack([torch.zeros(500, dtype=torch.int64), torch.arange(500)], dim=1)
    with pytest.raises(AssertionError) as caught:
        assert_identity(torch.full((500, 1024), 0.5), source)
    assert len(str(caught.value).splitlines()) == 9
    with pytest.raises(AssertionError, match="3 rows, but 500 expected"):
        assert_identity(torch.zeros(3, 16), source)


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"not torch\.float16"):
        identity_payload(0, 1, 64, torch.float16)
    with pytest.raises(ConfigError, match="hidden=7 is below the 8 columns"):
        identity_payload(0, 1, 7, torch.bfloat16)
    with pytest.raises(ConfigError, match="rank=16384 needs more than 2 digits of base 128"):
        identity_payload(16384, 1, 8, torch.bfloat16)
    with pytest.raises(ConfigError, match="token=2097152 needs more than 3 digits"):
        identity_rows(torch.tensor([[0, 2**21]]), 8, torch.bfloat16)
    with pytest.raises(ConfigError, match="hidden=131073 is above 131072"):
        identity_payload(0, 1, 131073, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_payload(dtype: torch.dtype) -> None:
    rows = random_payload(1, 50, 128, dtype, seed=3)
    assert rows.shape == (50, 128) and rows.dtype == dtype and bool(torch.isfinite(rows).all())
    assert torch.equal(rows, random_payload(1, 50, 128, dtype, seed=3))
    assert not torch.equal(rows, random_payload(2, 50, 128, dtype, seed=3))
    spread = rows.float().std(dim=1)
    assert float(spread.max() / spread.min()) > 100
