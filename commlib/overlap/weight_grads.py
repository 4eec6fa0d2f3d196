"""Linear layers whose weight gradients can wait: they fill the time in which rows move, or a pipeline's bubbles.

Inside an overlapped stage (`WeightGradStore.recording`) autograd sees no weight of theirs: its backward pass leaves the
gradients of weights in the store as work to do. Anywhere else these functions are ordinary differentiable operations.
Inside a function that ``torch.compile`` compiles, gradients of weights come with those of inputs: a compiled backward
pass is one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from commlib.overlap.anchor import ANCHOR

__all__ = ["WeightGradStore", "WeightWork", "grouped_linear", "linear"]

# Gradients of weights that are still to be computed, in the order in which they have to be added.
WeightWork = tuple[Callable[[], None], ...]


class WeightGradStore:
    """Where the layers of a stage leave the gradients of their weights."""

    def __init__(self) -> None:
        # By identity of the weight: one that is used twice gets the sum of both gradients, as from autograd.
        self._work: dict[int, tuple[Tensor, list[Callable[[], Tensor]]]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Layers called inside leave their weights' gradients here when they are differentiated, in any thread."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def put(self, weight: Tensor, compute: Callable[[], Tensor]) -> None:
        """Remembers that `compute()` has to be added to the gradient of `weight`."""
        self._work.setdefault(id(weight), (weight, []))[1].append(compute)

    def take(self) -> WeightWork:
        """Everything that was put here since the last call."""
        work, self._work = tuple(partial(_add, *each) for each in self._work.values()), {}
        return work


def _add(weight: Tensor, computations: list[Callable[[], Tensor]]) -> None:
    grad = computations[0]()
    for compute in computations[1:]:
        grad = grad + compute()
    # As autograd adds: also through a cast or a view of the parameter, and with the parameter's hooks.
    torch.autograd.backward([weight], [grad])


_current: ContextVar[WeightGradStore | None] = ContextVar("commlib weight gradients", default=None)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`y = x W^T` in the dtype of `x`.

    Args:
        x: [..., in].
        weight: [out, in], of any floating dtype; it is cast to that of `x`, its gradient back.

    Returns:
        [..., out].
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight.to(x.dtype))
    out: Tensor
    store = store_for(weight)
    if store is None:
        out = _Linear.apply(x, weight)  # type: ignore[no-untyped-call]
    else:
        out = _LinearLater.apply(ANCHOR, x, (weight,), store)  # type: ignore[no-untyped-call]
    return out


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`y[r] = x[r] W[e]^T` for the rows r of each expert e, in the dtype of `x`.

    Args:
        x: [rows, in], rows of an expert side by side.
        weight: [experts, out, in], of any floating dtype; it is cast to that of `x`, its gradient back.
        ends: int32 [experts], where each expert's rows stop.

    Returns:
        [rows, out].
    """
    if torch.compiler.is_compiling():
        return F.grouped_mm(x, weight.to(x.dtype).transpose(1, 2), offs=ends)
    out: Tensor
    store = store_for(weight)
    if store is None:
        out = _GroupedLinear.apply(x, weight, ends)  # type: ignore[no-untyped-call]
    else:
        out = _GroupedLinearLater.apply(ANCHOR, x, (weight,), ends, store)  # type: ignore[no-untyped-call]
    return out


def store_for(*weights: Tensor) -> WeightGradStore | None:
    """Where gradients of these weights wait; None: they are wanted with all others, or not at all."""
    is_wanted = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    return _current.get() if is_wanted else None


def _linear_weight_grad(x: Tensor, weight: Tensor, grad: Tensor) -> Tensor:
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return (grads.t() @ rows).to(weight.dtype)


def _grouped_weight_grad(x: Tensor, weight: Tensor, ends: Tensor, grad: Tensor) -> Tensor:
    return F.grouped_mm(grad.t(), x, offs=ends).to(weight.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = _linear_weight_grad(x, weight, grad) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


class _LinearLater(torch.autograd.Function):
    """Its weight comes in a tuple, unseen by autograd: its hooks must not run before its gradient is there."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, weight: tuple[Tensor], store: WeightGradStore) -> Tensor:
        ctx.save_for_backward(x, weight[0])  # what _Linear saves: recomputation may run the other one
        ctx.weight, ctx.store = weight[0], store
        return F.linear(x, weight[0].to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[1] else None
        ctx.store.put(ctx.weight, partial(_linear_weight_grad, x, weight, grad))
        return None, grad_x, None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return F.grouped_mm(x, weight.to(x.dtype).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, ends = ctx.saved_tensors
        grad_x = F.grouped_mm(grad, weight.to(grad.dtype), offs=ends) if ctx.needs_input_grad[0] else None
        grad_weight = _grouped_weight_grad(x, weight, ends, grad) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


class _GroupedLinearLater(torch.autograd.Function):
    """See `_LinearLater`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, weight: tuple[Tensor], ends: Tensor, store: WeightGradStore
    ) -> Tensor:
        ctx.save_for_backward(x, weight[0], ends)
        ctx.weight, ctx.store = weight[0], store
        return F.grouped_mm(x, weight[0].to(x.dtype).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, ends = ctx.saved_tensors
        grad_x = F.grouped_mm(grad, weight.to(grad.dtype), offs=ends) if ctx.needs_input_grad[1] else None
        ctx.store.put(ctx.weight, partial(_grouped_weight_grad, x, weight, ends, grad))
        return None, grad_x, None, None, None
