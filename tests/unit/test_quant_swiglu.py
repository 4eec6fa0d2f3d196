"""SwiGLU between casts, against FP64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from commlib.errors import ConfigError
from commlib.quant import Fp8Rows, cast_rows, quantize_e4m3, swiglu_again, swiglu_backward, swiglu_cast

ROWS, WIDTH = 40, 256
# Of a cast: half a unit of 3 bits of mantissa, or of 2^-9 s where they run out; roundings of FP32 on the way.
RELATIVE, ABSOLUTE = 2.0**-4 + 2.0**-20, 2.0**-10 + 2.0**-20


def make(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(ROWS, WIDTH, generator=generator) * torch.logspace(-3, 2, ROWS)[:, None]).to(dtype)


def assert_cast(rows: Fp8Rows, exact: Tensor) -> None:
    scales = rows.scales.repeat_interleave(128, dim=1).double()
    error = (rows.fp8.double() * scales - exact.double()).abs()
    assert bool((error <= RELATIVE * exact.double().abs() + ABSOLUTE * scales).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward(dtype: torch.dtype) -> None:
    gate, up, weights = make(1, dtype), make(2, dtype), torch.linspace(0, 2, ROWS)
    got = swiglu_cast(gate, up, weights)
    assert_cast(got.inner, torch.nn.functional.silu(gate.double()) * up.double() * weights.double()[:, None])
    for kept, given in ((got.gate, gate), (got.up, up)):
        q, scales = quantize_e4m3(given, pow2=True)
        assert kept.dtype == dtype and torch.equal(kept.fp8.view(torch.uint8), q.view(torch.uint8))
        assert torch.equal(kept.scales, scales)
    again = swiglu_again(got.gate, got.up, weights)
    gate_kept, up_kept = got.gate.dequantize().double(), got.up.dequantize().double()
    assert_cast(again, torch.nn.functional.silu(gate_kept) * up_kept * weights.double()[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_is_the_derivative(dtype: torch.dtype) -> None:
    gate, up = (cast_rows(make(seed, dtype)) for seed in (3, 4))
    weights, grad = torch.linspace(0, 2, ROWS), make(5, dtype)
    got = swiglu_backward(grad, gate, up, weights)
    exact = [each.double().requires_grad_() for each in (gate.dequantize(), up.dequantize(), weights)]
    (torch.nn.functional.silu(exact[0]) * exact[1] * exact[2][:, None]).backward(grad.double())
    for ours, theirs in ((got.gate, exact[0]), (got.up, exact[1])):
        assert theirs.grad is not None
        assert_cast(ours, theirs.grad)
    assert exact[2].grad is not None
    magnitude = (grad.double() * torch.nn.functional.silu(exact[0]) * exact[1]).abs().sum(dim=1)
    # A sum of 256 products of a few roundings each.
    assert bool(((got.row_weights - exact[2].grad).abs() <= (WIDTH + 8) * 2.0**-24 * magnitude).all())


def test_widths_are_whole_tiles() -> None:
    x = torch.zeros(4, 100)
    with pytest.raises(ConfigError):
        swiglu_cast(x, x, torch.ones(4))
