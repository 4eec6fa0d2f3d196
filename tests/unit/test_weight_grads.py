"""Linear layers whose weight gradients can be put off: the bits of torch's own, whenever they are computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from commlib.overlap import WeightGradStore, grouped_linear, linear
from commlib.overlap.segment import Segment

ENDS = torch.tensor([3, 3, 10, 12], dtype=torch.int32)


def torch_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))


def torch_grouped(x: Tensor, weight: Tensor) -> Tensor:
    return F.grouped_mm(x, weight.to(x.dtype).transpose(1, 2), offs=ENDS)


def our_grouped(x: Tensor, weight: Tensor) -> Tensor:
    return grouped_linear(x, weight, ENDS)


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


Call = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize("is_later", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("ours", "theirs", "x_shape", "weight_shape"),
    [
        (linear, torch_linear, (12, 32), (16, 32)),
        (linear, torch_linear, (2, 6, 32), (16, 32)),
        (our_grouped, torch_grouped, (12, 32), (4, 16, 32)),
    ],
)
def test_bits_of_torch(
    ours: Call,
    theirs: Call,
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    dtype: torch.dtype,
    is_later: bool,
) -> None:
    """Used twice, with a gradient there already, weights in FP32: sums in the order of autograd."""
    x, weight = make(x_shape, dtype, 1), make(weight_shape, torch.float32, 2)
    grad = make((*x_shape[:-1], weight_shape[-2]), dtype, 3).detach()
    start = make(weight_shape, torch.float32, 4).detach()
    weight.grad = start.clone()
    out = theirs(x, weight) * theirs(x * 2, weight)
    out.backward(grad)  # type: ignore[no-untyped-call]
    expected = out.detach(), x.grad, weight.grad
    x.grad, weight.grad = None, start.clone()
    store = WeightGradStore()
    with store.recording() if is_later else nullcontext():
        out = ours(x, weight) * ours(x * 2, weight)
    out.backward(grad)  # type: ignore[no-untyped-call]
    if is_later:
        assert torch.equal(weight.grad, start)
        (work,) = store.take()
        work()
    assert store.take() == ()
    assert all(torch.equal(a, b) for a, b in zip((out, x.grad, weight.grad), expected, strict=True))


def test_hooks_of_the_parameter_run_and_frozen_ones_cost_nothing() -> None:
    x, weight, frozen = make((4, 8), torch.float32, 1), make((8, 8), torch.float32, 2), torch.ones(8, 8)
    seen = []
    weight.register_post_accumulate_grad_hook(seen.append)
    store = WeightGradStore()
    with store.recording():
        out = linear(linear(x, weight), frozen)
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert seen == [] and x.grad is not None
    works = store.take()
    assert len(works) == 1
    works[0]()
    assert len(seen) == 1 and seen[0] is weight


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_layers(use_reentrant: bool) -> None:
    x, weight = make((4, 8), torch.float32, 1), make((8, 8), torch.float32, 2)
    linear(x, weight).sin().sum().backward()  # type: ignore[no-untyped-call]
    expected, x.grad, weight.grad = (x.grad, weight.grad), None, None
    store = WeightGradStore()
    with store.recording():
        out = checkpoint(lambda x: linear(x, weight).sin(), x, use_reentrant=use_reentrant)
    out.sum().backward()
    for work in store.take():
        work()
    assert expected[0] is not None and expected[1] is not None and x.grad is not None and weight.grad is not None
    assert torch.equal(x.grad, expected[0]) and torch.equal(weight.grad, expected[1])


def test_compiled_layers() -> None:
    """Weights' gradients come at once, and without breaks of the graph."""
    x, weight = make((4, 8), torch.float32, 1), make((8, 8), torch.float32, 2)
    (linear(x, weight) @ weight).sum().backward()  # type: ignore[no-untyped-call]
    expected, x.grad, weight.grad = (x.grad, weight.grad), None, None
    store = WeightGradStore()
    with store.recording():
        compiled = torch.compile(lambda x, w: linear(x, w) @ w, backend="aot_eager", fullgraph=True)
        compiled(x, weight).sum().backward()
    assert store.take() == ()
    assert expected[0] is not None and expected[1] is not None and x.grad is not None and weight.grad is not None
    assert torch.equal(x.grad, expected[0]) and torch.equal(weight.grad, expected[1])


class TestSegment:
    def test_gradients_end_at_the_inputs(self) -> None:
        before = make((3,), torch.float32, 1)
        weight = make((3,), torch.float32, 2)
        index = torch.tensor([2, 1, 0])
        segment = Segment((before * 2, index, before), lambda x, i, _: (x[i] * weight, x, x.detach()))
        assert segment.needs_grad == (True, True, False)
        outputs = segment.take_outputs()
        assert not any(output.requires_grad for output in outputs) and segment.outputs == ()
        grads = segment.backward((torch.ones(3), torch.full((3,), 5.0), torch.ones(3)))
        assert before.grad is None
        assert grads[0] is not None and torch.equal(grads[0], weight.detach()[[2, 1, 0]] + 5)
        assert grads[1] is None and grads[2] is None
        assert weight.grad is not None and torch.equal(weight.grad, (before.detach() * 2)[[2, 1, 0]])

    def test_no_memory_of_inputs_and_outputs_is_kept(self) -> None:
        """An addition needs neither for its backward pass."""
        parts = [torch.zeros(3) for _ in range(2)]
        pointers = [part.untyped_storage()._weak_ref() for part in parts]
        segment = Segment(parts, lambda a, b: (a + b,))
        outputs = segment.take_outputs()
        pointers.append(outputs[0].untyped_storage()._weak_ref())
        del parts, outputs
        assert all(torch.UntypedStorage._expired(pointer) for pointer in pointers)
        assert [None if g is None else g.tolist() for g in segment.backward((torch.ones(3),))] == [[1.0] * 3] * 2

    def test_unneeded_inputs_and_no_grad(self) -> None:
        x = torch.ones(2)
        weight = make((2,), torch.float32, 1)
        segment = Segment((x,), lambda x: (x * weight,), is_needed=(False,))
        assert segment.backward((torch.ones(2),)) == [None]
        assert weight.grad is not None
        with torch.no_grad():
            assert Segment((x,), lambda x: (x * weight,)).needs_grad == (False,)
