import math

import ml_dtypes
import numpy as np
import pytest
import torch

from commlib.errors import ConfigError
from commlib.quant import dequantize, quantize_e4m3


def bits(q: torch.Tensor) -> np.ndarray:
    return q.view(torch.uint8).numpy()


def slow_quantize(x: torch.Tensor, pow2: bool) -> tuple[np.ndarray, np.ndarray]:
    """One element at a time, in NumPy FP32 scalars and ml_dtypes' rounding."""
    rows = x.float().numpy()
    q = np.zeros(rows.shape, dtype=np.uint8)
    scales = np.zeros((rows.shape[0], rows.shape[1] // 128), dtype=np.float32)
    for t, block in np.ndindex(scales.shape):
        values = rows[t, block * 128 : (block + 1) * 128]
        amax = np.float32(1e-4)
        for value in values:
            if abs(value) > amax:  # False for NaN
                amax = abs(value)
        scale = np.float32(amax / np.float32(448.0))
        if pow2:
            exponent = -200
            while math.ldexp(1.0, exponent) < float(scale):
                exponent += 1
            scale = np.float32(math.ldexp(1.0, exponent))
        scales[t, block] = scale
        for i, value in enumerate(values):
            ratio = np.float32(value / scale)
            if not np.isnan(ratio):
                ratio = np.float32(min(max(ratio, np.float32(-448)), np.float32(448)))
            q[t, block * 128 + i] = np.array(ratio).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return q, scales


def sample(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 256, generator=generator) * torch.exp2(torch.arange(-30.0, 30.0, 5.0))[:, None]
    x[3] = 0
    x[4, :128] = 0
    x[5, 7] = float("nan")
    x[6, 130] = -0.0
    # Rounding ties of E4M3 (17 lies between 16 and 18) with an amax that makes the scale exactly 1.
    x[7, :5] = torch.tensor([448.0, 17.0, -19.0, 2.0**-10, 3 * 2.0**-10])
    x[7, 5:128] = 0
    return x.to(dtype)


@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_loop(dtype: torch.dtype, pow2: bool) -> None:
    x = sample(dtype)
    q, scales = quantize_e4m3(x, pow2=pow2)
    expected_q, expected_scales = slow_quantize(x, pow2)
    assert q.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    np.testing.assert_array_equal(scales.numpy(), expected_scales)
    np.testing.assert_array_equal(bits(q) & 0x7F == 0x7F, expected_q & 0x7F == 0x7F)
    finite = bits(q) & 0x7F != 0x7F
    np.testing.assert_array_equal(bits(q)[finite], expected_q[finite])


def test_ties_round_to_even() -> None:
    q, scales = quantize_e4m3(sample(torch.float32)[7:8])
    assert float(scales[0, 0]) == 1.0
    assert q[0, :5].float().tolist() == [448.0, 16.0, -20.0, 0.0, 2.0**-8]


def test_pow2_is_exact_at_powers_of_two() -> None:
    # amax / 448 = 2^e exactly must stay 2^e; one step above must go to 2^(e + 1). log2f cannot tell them apart.
    for exponent in range(-20, 100):
        exact = 448.0 * 2.0**exponent
        x = torch.zeros(3, 128)
        x[0, 0] = exact
        x[1, 0] = float(np.nextafter(np.float32(exact), np.float32(np.inf)))
        x[2, 0] = float(np.nextafter(np.float32(exact), np.float32(0)))
        scales = quantize_e4m3(x, pow2=True)[1][:, 0].tolist()
        quotients = (x[:, 0].numpy() / np.float32(448)).tolist()
        for scale, quotient in zip(scales, quotients, strict=True):
            assert math.frexp(scale)[0] == 0.5 and scale / 2 < quotient <= scale
        assert scales == [2.0**exponent, 2.0 ** (exponent + 1), 2.0**exponent]


def test_zero_rows_have_the_floor_scale() -> None:
    q, scales = quantize_e4m3(torch.zeros(2, 128, dtype=torch.bfloat16))
    assert not bits(q).any()
    assert scales.tolist() == [[float(np.float32(1e-4) / np.float32(448))]] * 2


@pytest.mark.parametrize("pow2", [False, True])
def test_nan_and_infinity(pow2: bool) -> None:
    x = torch.ones(2, 256)
    x[0, 3] = float("nan")
    x[1, 3] = float("-inf")
    q, scales = quantize_e4m3(x, pow2=pow2)
    clean_q, clean_scales = quantize_e4m3(torch.ones(1, 256), pow2=pow2)
    restored = dequantize(q, scales, torch.float32)
    assert torch.equal(scales[0], clean_scales[0])
    assert restored[0].isnan().nonzero().tolist() == [[3]]
    np.testing.assert_array_equal(np.delete(bits(q)[0], 3), np.delete(bits(clean_q)[0], 3))
    assert float(scales[1, 0]) == math.inf and bool(restored[1, :128].isnan().all())
    assert not restored[1, 128:].isnan().any()


def test_saturates_at_448() -> None:
    # The scale may round down, and then amax / scale lies above 448.
    x = torch.zeros(4096, 128)
    x[:, 0] = torch.arange(1, 4097) / 7.0
    q, scales = quantize_e4m3(x)
    assert bool((x[:, 0] / scales[:, 0] > 448).any())
    assert bool((q[:, 0].float() == 448).all())


@pytest.mark.parametrize("pow2", [False, True])
def test_round_trip_error(pow2: bool) -> None:
    x = sample(torch.float32)[8:]
    q, scales = quantize_e4m3(x, pow2=pow2)
    error = (dequantize(q, scales, torch.float32).double() - x.double()).abs()
    # E4M3 rounds by at most 2^-4 relative, or half its smallest step, 2^-10, times the scale; FP32 division and product
    # add 2^-24 relative each.
    per_column = scales.double().repeat_interleave(128, dim=1)
    bound = torch.maximum(x.double().abs() * 2.0**-4, per_column * 2.0**-10) + x.double().abs() * 3 * 2.0**-24
    assert bool((error <= bound).all())


def test_dequantize_by_hand() -> None:
    q = torch.full((1, 256), 3.0).to(torch.float8_e4m3fn)
    out = dequantize(q, torch.tensor([[0.5, 2.0]]), torch.bfloat16)
    assert out.dtype == torch.bfloat16 and out.tolist() == [[1.5] * 128 + [6.0] * 128]


def test_no_tokens() -> None:
    q, scales = quantize_e4m3(torch.empty(0, 256))
    assert q.shape == (0, 256) and scales.shape == (0, 2)
    assert dequantize(q, scales, torch.float32).shape == (0, 256)


def test_errors() -> None:
    with pytest.raises(ConfigError, match="hidden=100 is not a positive multiple of scale_block=128"):
        quantize_e4m3(torch.zeros(1, 100))
    with pytest.raises(ConfigError, match=r"x is torch\.float16 \[1, 128\]"):
        quantize_e4m3(torch.zeros(1, 128, dtype=torch.float16))
    with pytest.raises(ConfigError, match=r"scales has shape \[1, 2\], the rule: \[1, 1\]"):
        dequantize(torch.zeros(1, 128).to(torch.float8_e4m3fn), torch.zeros(1, 2), torch.float32)
