"""Rows that say who they are: source rank and token are legible in every 16 bytes of a row.

An identity row is a sequence of cells of 16 bytes. A cell is a number of digits, one per column. A column holds its
digit + 1, so that one which nobody wrote (0) is no digit:

* BF16, 8 columns, base 128 (BF16 is exact up to 256): rank 2 digits, token 3, cell index 2, check digit 1;
* FP32, 4 columns, base 2^14 (FP32 is exact up to 2^24): rank 1 digit, token 2, cell index 1.

Copies go by 16 bytes or more, so any piece of another row, or of another place of the row, breaks at least one cell:
`assert_identity` compares every column exactly and names what lies there instead. If `hidden` is no multiple of the
cell, the last cell is cut short; it is compared, but not decoded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from commlib.errors import ConfigError

__all__ = [
    "Decoded",
    "assert_identity",
    "decode",
    "identity_payload",
    "identity_rows",
    "random_payload",
]


@dataclass(frozen=True)
class _Code:
    """How a cell spells (rank, token, cell index): digits of each, and whether a check digit follows."""

    base: int
    rank_digits: int
    token_digits: int
    cell_digits: int
    has_check: bool

    @property
    def num_columns(self) -> int:
        return self.rank_digits + self.token_digits + self.cell_digits + self.has_check


_CODES = {
    torch.bfloat16: _Code(base=128, rank_digits=2, token_digits=3, cell_digits=2, has_check=True),
    torch.float32: _Code(base=2**14, rank_digits=1, token_digits=2, cell_digits=1, has_check=False),
}

_MAX_LISTED = 8


class Decoded(NamedTuple):
    """What `decode` finds, int64 [P, whole cells] each: -1 where a cell is not legible or lies in the wrong place."""

    rank: Tensor
    token: Tensor


def _code(dtype: torch.dtype, hidden: int) -> _Code:
    if dtype not in _CODES:
        raise ConfigError(f"identity payloads are bfloat16 or float32, not {dtype}")
    code = _CODES[dtype]
    if hidden < code.num_columns:
        raise ConfigError(f"hidden={hidden} is below the {code.num_columns} columns of one {dtype} cell")
    if -(-hidden // code.num_columns) > code.base**code.cell_digits:
        most = code.base**code.cell_digits * code.num_columns
        raise ConfigError(f"hidden={hidden} is above {most}, beyond which the cell index has too few digits")
    return code


def _digits(numbers: Tensor, num_digits: int, base: int) -> list[Tensor]:
    """Most significant first."""
    return [numbers // base**power % base for power in range(num_digits - 1, -1, -1)]


def _check_digit(digits: list[Tensor], base: int) -> Tensor:
    """Odd factors are invertible modulo a power of two: changing one digit always changes the sum."""
    return sum(((2 * place + 1) * digit for place, digit in enumerate(digits)), torch.tensor(17)) % base


def identity_rows(source: Tensor, hidden: int, dtype: torch.dtype) -> Tensor:
    """The identity row of each entry of `source`; zeros where its rank is -1 (padding).

    Args:
        source: int64 [P, >= 2]: source rank, token, further columns ignored.
        hidden: columns.
        dtype: bfloat16 or float32.

    Returns:
        [P, hidden] of `dtype`.
    """
    code = _code(dtype, hidden)
    rank, token = source[:, 0:1].long(), source[:, 1:2].long()
    for name, numbers, num_digits in (("rank", rank, code.rank_digits), ("token", token, code.token_digits)):
        if numbers.numel() and int(numbers.max()) >= code.base**num_digits:
            raise ConfigError(f"{name}={int(numbers.max())} needs more than {num_digits} digits of base {code.base}")
    num_cells = -(-hidden // code.num_columns)
    cell = torch.arange(num_cells).expand(len(source), num_cells)
    digits = [
        *_digits(rank.expand_as(cell), code.rank_digits, code.base),
        *_digits(token.expand_as(cell), code.token_digits, code.base),
        *_digits(cell, code.cell_digits, code.base),
    ]
    if code.has_check:
        digits.append(_check_digit(digits, code.base))
    rows = (torch.stack(digits, dim=2) + 1).flatten(1)[:, :hidden]
    return torch.where(rank >= 0, rows, 0).to(dtype).contiguous()


def identity_payload(rank: int, num_tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """The identity rows of tokens 0 .. num_tokens-1 of `rank`: [num_tokens, hidden] of `dtype`."""
    tokens = torch.arange(num_tokens)
    return identity_rows(torch.stack([torch.full_like(tokens, rank), tokens], dim=1), hidden, dtype)


def decode(rows: Tensor) -> Decoded:
    """Reads every whole cell of `rows` [P, hidden]."""
    code = _code(rows.dtype, rows.shape[1])
    num_cells = rows.shape[1] // code.num_columns
    cells = rows[:, : num_cells * code.num_columns].reshape(len(rows), num_cells, code.num_columns).double()
    is_digit = (cells == cells.round()) & (cells >= 1) & (cells <= code.base)
    digits = list((torch.where(is_digit, cells, 1.0).long() - 1).unbind(dim=2))

    def number(first: int, num_digits: int) -> Tensor:
        value = torch.zeros(len(rows), num_cells, dtype=torch.int64)
        for digit in digits[first : first + num_digits]:
            value = value * code.base + digit
        return value

    cell = number(code.rank_digits + code.token_digits, code.cell_digits)
    is_legible = is_digit.all(dim=2) & (cell == torch.arange(num_cells))
    if code.has_check:
        is_legible &= _check_digit(digits[:-1], code.base) == digits[-1]
    return Decoded(
        rank=torch.where(is_legible, number(0, code.rank_digits), -1),
        token=torch.where(is_legible, number(code.rank_digits, code.token_digits), -1),
    )


def _name(rank: int, token: int) -> str:
    return "padding (zeros)" if rank < 0 else f"rank {rank} token {token}"


def _describe_row(row: Tensor, expected: Tensor, decoded_rank: list[int], decoded_token: list[int]) -> str:
    """What lies in one wrong row: runs of columns by content, wrong ones only."""
    width = _CODES[row.dtype].num_columns
    is_wrong = ~((row == expected) & (torch.signbit(row) == torch.signbit(expected)))
    runs: list[tuple[int, int, str]] = []
    for first in range(0, row.shape[0], width):
        last = min(first + width, row.shape[0]) - 1
        if not bool(is_wrong[first : last + 1].any()):
            continue
        cell = first // width
        if cell < len(decoded_rank) and decoded_rank[cell] >= 0:
            content = _name(decoded_rank[cell], decoded_token[cell])
        elif not bool(row[first : last + 1].any()):
            content = "zeros"
        else:
            content = f"no identity ({', '.join(f'{value:g}' for value in row[first : last + 1].tolist())})"
        if runs and runs[-1][2] == content and runs[-1][1] == first - 1:
            first = runs.pop()[0]
        runs.append((first, last, content))
    listed = [f"columns {first}..{last} hold {content}" for first, last, content in runs[:_MAX_LISTED]]
    return "; ".join(listed + ([f"and {len(runs) - _MAX_LISTED} more runs"] if len(runs) > _MAX_LISTED else []))


def assert_identity(rows: Tensor, source: Tensor) -> None:
    """Checks that every row is, in every column and bit, the identity row that `source` says.

    Args:
        rows: bfloat16 or float32 [P, hidden].
        source: int64 [P, >= 2]: source rank, token; -1 for padding, which must be zeros.

    Raises:
        AssertionError: names up to 8 wrong rows, what they should hold and what lies in which of their columns.
    """
    if len(rows) != len(source):
        raise AssertionError(f"{len(rows)} rows, but {len(source)} expected")
    expected = identity_rows(source, rows.shape[1], rows.dtype)
    bits = torch.int16 if rows.dtype == torch.bfloat16 else torch.int32
    wrong = torch.nonzero((rows.contiguous().view(bits) != expected.view(bits)).any(dim=1))[:, 0].tolist()
    if not wrong:
        return
    shown = wrong[:_MAX_LISTED]
    decoded = decode(rows[shown])
    lines = [f"{len(wrong)} of {len(rows)} rows are wrong"]
    for place, row in enumerate(shown):
        found = _describe_row(rows[row], expected[row], decoded.rank[place].tolist(), decoded.token[place].tolist())
        lines.append(f"  row {row}, expected {_name(*map(int, source[row, :2].tolist()))}: {found}")
    raise AssertionError("\n".join(lines))


def random_payload(rank: int, num_tokens: int, hidden: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normally distributed rows with a few outliers in scale, as activations have: [num_tokens, hidden] of `dtype`.

    Every row has a scale between 2^-6 and 2^6 of its own, so that sums of rows round. Depends on its arguments only.
    """
    rng = np.random.default_rng([seed, rank, num_tokens, hidden])
    scales = np.exp2(rng.uniform(-6, 6, size=(num_tokens, 1)))
    values = (rng.standard_normal((num_tokens, hidden)) * scales).astype(np.float32)
    return torch.from_numpy(values).to(dtype)
