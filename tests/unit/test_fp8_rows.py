"""`quant.Fp8Rows`: a tensor of another dtype that keeps FP8."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from commlib.errors import ConfigError
from commlib.payload import framework_of
from commlib.quant import Fp8Rows, dequantize, quantize_e4m3


def make(num_tokens: int = 6, hidden: int = 256, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Fp8Rows:
    x = torch.randn(num_tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Fp8Rows(*quantize_e4m3(x, pow2=True), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operations_see_the_dequantized_rows(dtype: torch.dtype) -> None:
    rows, weight = make(dtype=dtype), torch.randn(8, 256).to(dtype)
    plain = dequantize(rows.fp8, rows.scales, dtype)
    assert rows.dtype == dtype and rows.shape == (6, 256) and rows.is_contiguous()
    assert torch.equal(rows.dequantize(), plain)
    assert torch.equal(torch.nn.functional.linear(rows, weight), torch.nn.functional.linear(plain, weight))
    assert torch.equal(rows[2:4], plain[2:4]) and torch.equal(rows + rows, plain + plain)
    assert torch.equal(torch.cat([rows, plain]), torch.cat([plain, plain]))


def test_only_what_keeps_the_shape_stays_fp8() -> None:
    rows = make()
    for same in (rows.detach(), rows.view(6, 256), rows.view(-1, 256), rows.view_as(rows), rows.reshape(6, -1)):
        assert isinstance(same, Fp8Rows) and same.fp8 is rows.fp8 and same.scales is rows.scales
    for other in (rows.view(3, 512), rows.t(), rows.float(), rows.clone(), rows.view(12, 128)):
        assert not isinstance(other, Fp8Rows)


def test_is_never_written_to() -> None:
    rows = make()
    before = rows.dequantize()
    for write in (lambda: rows.add_(1), lambda: rows.zero_(), lambda: rows.copy_(before)):
        with pytest.raises(ConfigError, match="would write into FP8 rows"):
            write()
    with pytest.raises(ConfigError, match="would write into FP8 rows"):
        torch.add(before, before, out=rows)
    assert torch.equal(rows.dequantize(), before)


def test_has_no_memory_to_hand_out() -> None:
    with pytest.raises(ConfigError, match="x is a Fp8Rows, which has no memory of its own"):
        framework_of(make(), "x")


def test_shapes_and_dtypes_are_checked() -> None:
    rows = make()
    with pytest.raises(ConfigError, match=r"scales has shape \[6, 1\]"):
        Fp8Rows(rows.fp8, rows.scales[:, :1], torch.bfloat16)
    with pytest.raises(ConfigError, match="the rule: float8_e4m3fn"):
        Fp8Rows(rows.dequantize(), rows.scales, torch.bfloat16)


class _Straight(torch.autograd.Function):
    """FP8 rows forwards; backwards the gradient in FP8 rows: what dispatch and combine do."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return Fp8Rows(*quantize_e4m3(x, pow2=True), x.dtype)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def test_gradients_have_the_dtype_it_stands_for_and_ordinary_layers_keep_fp8() -> None:
    x = torch.randn(4, 128, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(8, 128, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    rows = _Straight.apply(x)  # type: ignore[no-untyped-call]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = torch.nn.functional.linear(rows, weight)
    assert [each for each in kept if each.shape == x.shape and isinstance(each, Fp8Rows)]
    assert not [each for each in kept if each.shape == x.shape and not isinstance(each, Fp8Rows)]
    grad = torch.randn(4, 8, dtype=torch.bfloat16)
    y.backward(grad)
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and torch.equal(x.grad, grad @ weight)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, grad.t() @ rows.dequantize(), rtol=0, atol=0)


def test_a_gradient_may_be_fp8_rows() -> None:
    seen: list[type] = []

    class Take(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            seen.append(type(grad))
            return grad

    x = torch.zeros(6, 256, dtype=torch.bfloat16, requires_grad=True)
    grad = make()
    torch.autograd.backward([Take.apply(x)], [grad])  # type: ignore[no-untyped-call]
    assert seen == [Fp8Rows]
    assert x.grad is not None and torch.equal(x.grad, grad.dequantize())


def test_goes_into_compiled_functions() -> None:
    rows, weight = make(), torch.randn(8, 256, dtype=torch.bfloat16)

    def layer(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(torch.nn.functional.linear(x, weight))

    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(rows), layer(rows), rtol=0, atol=0)
