"""E5M6, 128x128 weights and 128x1 tiles against oracles that go number by number, and their error bounds."""

import numpy as np
import pytest
import torch
from torch import Tensor

from commlib.errors import ConfigError
from commlib.quant import (
    dequantize,
    dequantize_columns,
    dequantize_e5m6,
    dequantize_weight,
    quantize_e4m3,
    quantize_e5m6,
    quantize_weight,
    retile_columns,
)


def e5m6_table() -> list[float]:
    """All finite numbers of the format, by code: sign, 5 bits of exponent, 6 of mantissa."""
    numbers = []
    for code in range(1 << 11):
        exponent, mantissa = code >> 6, code & 63
        if exponent == 31:
            break
        numbers.append(mantissa * 2.0**-20 if exponent == 0 else (1 + mantissa / 64) * 2.0 ** (exponent - 15))
    return numbers


E5M6 = e5m6_table()


def nearest_code(value: float) -> int:
    """The code of the nearest number; of two, the even one."""
    distance = np.abs(np.array(E5M6) - abs(value))
    codes = np.flatnonzero(distance == distance.min())
    code = int(codes[codes % 2 == 0][0]) if len(codes) > 1 else int(codes[0])
    return code | (0x800 if np.signbit(value) else 0)


def codes_of(packed: Tensor) -> list[int]:
    raw = packed.numpy().tobytes()
    codes = []
    for i in range(0, len(raw), 3):
        bits = int.from_bytes(raw[i : i + 3], "little")
        codes += [bits & 0xFFF, bits >> 12]
    return codes


def sample(rows: int, columns: int, dtype: torch.dtype, spread: float = 12.0) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, columns, generator=generator)
    return (x * torch.exp2(spread * torch.randn(rows, columns, generator=generator) / 4)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_e5m6_rounds_to_the_nearest_number(dtype: torch.dtype) -> None:
    x = sample(5, 256, dtype, spread=40.0)
    x[0] = 0
    x[1, 3] = -0.0
    x[2, 5] = torch.nan
    packed, scales = quantize_e5m6(x)
    assert packed.shape == (5, 384) and packed.dtype == torch.uint8
    for row, block in np.ndindex(*scales.shape):
        values = x[row, block * 128 : (block + 1) * 128].float()
        amax = max(1e-4, float(values.abs().nan_to_num(0).max()))
        exponent = -60
        while 65024.0 * 2.0**exponent < np.float32(amax):
            exponent += 1
        assert float(scales[row, block]) == 2.0**exponent
        have = codes_of(packed[row : row + 1, block * 192 : (block + 1) * 192])
        for value, code in zip((values.double() / 2.0**exponent).tolist(), have, strict=True):
            assert code & 0x7FF == (31 << 6) + 32 if np.isnan(value) else code == nearest_code(value), (row, value)


def test_e5m6_every_number_comes_back() -> None:
    numbers = torch.tensor([*E5M6, *(-value for value in E5M6)])
    x = torch.zeros(-(-len(numbers) // 127), 128)
    x[:, 0] = 65024.0  # the scale of its block is 1
    filled = torch.zeros(x.shape[0] * 127)
    filled[: len(numbers)] = numbers
    x[:, 1:] = filled.view(-1, 127)
    packed, scales = quantize_e5m6(x)
    assert bool((scales == 1).all()) and torch.equal(dequantize_e5m6(packed, scales, torch.float32), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_e5m6_error_is_bounded(dtype: torch.dtype) -> None:
    x = sample(64, 512, dtype)
    packed, scales = quantize_e5m6(x)
    error = (dequantize_e5m6(packed, scales, torch.float32).double() - x.double()).abs()
    bound = 2.0**-7 * x.double().abs() + 2.0**-21 * scales.double().repeat_interleave(128, 1)
    assert bool((error <= bound).all())
    assert bool((error > 0.9 * 2.0**-7 * x.double().abs()).any())  # the bound is met, so it could be missed


def test_e5m6_infinity_spoils_its_block_only() -> None:
    x = torch.ones(1, 256)
    x[0, 7] = torch.inf
    back = dequantize_e5m6(*quantize_e5m6(x), torch.float32)
    assert bool(back[0, :128].isnan().all()) and bool((back[0, 128:] == 1).all())


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("shape", [(128, 256), (200, 130), (3, 140, 384)])
def test_weights_are_rows_with_the_scale_of_their_tile(shape: tuple[int, ...], pow2: bool) -> None:
    """Each tile, spread over one long row, is a row of 1x(128 * 128): the largest magnitude of a tile, nothing else."""
    w = sample(int(np.prod(shape[:-1])), shape[-1], torch.float32).reshape(shape)
    q, scales = quantize_weight(w, pow2=pow2)
    assert q.shape == w.shape and scales.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    for index in np.ndindex(*scales.shape):
        *batch, i, j = index
        rows, columns = slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128)
        tile, cast = w[(*batch, rows, columns)], q[(*batch, rows, columns)]
        line = torch.full((1, 128), float(tile.abs().max()))
        _, (scale,) = quantize_e4m3(line, pow2=pow2)
        assert float(scales[index]) == float(scale)
        wanted = (tile / scale).to(torch.float8_e4m3fn)
        assert torch.equal(cast.view(torch.uint8), wanted.view(torch.uint8))
    back = dequantize_weight(q, scales, torch.float32).double()
    spread = scales.double().repeat_interleave(128, -2)[..., : shape[-2], :]
    spread = spread.repeat_interleave(128, -1)[..., : shape[-1]]
    bound = 2.0**-4 * w.double().abs() * (1 + 2.0**-20) + 2.0**-10 * spread
    error = (back - w.double()).abs()
    assert bool((error <= bound).all()) and bool((error > 0.9 * 2.0**-4 * w.double().abs()).any())


@pytest.mark.parametrize("pow2", [False, True])
def test_columns_take_the_scale_of_128_tokens(pow2: bool) -> None:
    q, scales = quantize_e4m3(sample(256, 256, torch.bfloat16), pow2=pow2)
    x = dequantize(q, scales, torch.float32)
    tiled, tiled_scales = retile_columns(q, scales, pow2=pow2)
    # The same as the rows of the transpose.
    wanted, wanted_scales = quantize_e4m3(x.t().contiguous(), pow2=pow2)
    assert torch.equal(tiled.t().contiguous().view(torch.uint8), wanted.view(torch.uint8))
    assert torch.equal(tiled_scales.t(), wanted_scales)
    back = dequantize_columns(tiled, tiled_scales, torch.float32).double()
    spread = tiled_scales.double().repeat_interleave(128, 0)
    error, magnitude = (back - x.double()).abs(), x.double().abs()
    assert bool((error <= (0 if pow2 else 2.0**-4 * (1 + 2.0**-20)) * magnitude + 2.0**-10 * spread).all())
    if pow2:  # exact wherever the exponent reaches
        assert bool((back == x)[magnitude >= 2.0**-6 * spread].all())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"x is torch\.float64"):
        quantize_e5m6(torch.zeros(2, 128, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"packed has shape \[2, 128\], the rule: \[2, 192\]"):
        dequantize_e5m6(torch.zeros(2, 128, dtype=torch.uint8), torch.ones(2, 1), torch.float32)
    with pytest.raises(ConfigError, match=r"w is torch\.int32"):
        quantize_weight(torch.zeros(128, 128, dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"scales has shape \[1, 1\], the rule: \[2, 1\]"):
        dequantize_weight(torch.zeros(200, 128).to(torch.float8_e4m3fn), torch.ones(1, 1), torch.float32)
    with pytest.raises(ConfigError, match="num_tokens=100 is no multiple of 128"):
        retile_columns(torch.zeros(100, 128).to(torch.float8_e4m3fn), torch.ones(100, 1))
