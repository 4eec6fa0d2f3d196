"""Operations under way: checks of the caller's arrays, submission, and the results once they are there.

A rank whose input is bad still takes part: it publishes its reason in place of the operation, so that all ranks raise
in the same call and nobody is stranded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from commlib.config import RuntimeConfig
from commlib.errors import ConfigError
from commlib.executor import CombineCall, DispatchCall
from commlib.handle import Combined, Dispatched, Handle
from commlib.layout import Layout, num_scales
from commlib.payload import DTYPE_BYTES, DTYPE_CODES, Framework, Rows, framework_of, optional_array, require_rows

__all__ = ["PendingCombine", "PendingDispatch", "prepare_combine", "prepare_dispatch", "reason_of"]

_CASTS = {None: 0, "fp32": 1, "pow2": 2}
_LAYOUTS = {Layout.GROUPED: 0, Layout.ROWS: 1}


@dataclass
class PendingDispatch:
    """A dispatch under way. Holds the caller's arrays until it is over."""

    runtime_id: int
    submit: Callable[[], Any]
    framework: Framework
    dtype: str  # of the rows as they travel
    hidden: int
    num_topk: int
    layout: Layout
    handle: Handle | None
    inputs: tuple[Any, ...]
    op: Any = None  # None until it is submitted

    def is_finished(self) -> bool:
        """True once `dispatch_recv` would not wait."""
        return self.op is not None and bool(self.op.is_finished())

    def result(self) -> Dispatched:
        op, view = self.op, self.framework.view
        num_rows: int = op.num_rows
        x = view(op.rows(self.hidden * DTYPE_BYTES[self.dtype]), self.dtype, (num_rows, self.hidden))
        scales = None
        if self.dtype == "float8_e4m3fn":
            blocks = num_scales(self.hidden)
            scales = view(op.scales(blocks * 4), "float32", (num_rows, blocks))
        self.inputs = ()
        if self.handle is not None:
            return Dispatched(x, scales, None, None, None, self.handle.num_tokens_per_expert, self.handle)
        handle = Handle(op.handle, self.layout, self.runtime_id)
        row_weights = topk_idx = topk_weights = None
        if self.layout is Layout.GROUPED:
            row_weights = view(op.weights(num_rows), "float32", (num_rows,))
        else:
            shape = (num_rows, self.num_topk)
            topk_weights = view(op.weights(num_rows * self.num_topk), "float32", shape)
            topk_idx = view(op.topk_idx(num_rows * self.num_topk), "int64", shape)
        return Dispatched(x, scales, row_weights, topk_idx, topk_weights, handle.num_tokens_per_expert, handle)


@dataclass
class PendingCombine:
    """A combine under way. Holds the caller's arrays until it is over."""

    runtime_id: int
    submit: Callable[[], Any]
    out: Any
    out_weight_grads: Any
    inputs: tuple[Any, ...]
    op: Any = None  # None until it is submitted

    def is_finished(self) -> bool:
        """True once `combine_recv` would not wait."""
        return self.op is not None and bool(self.op.is_finished())

    def result(self) -> Combined:
        self.inputs = ()
        return Combined(self.out, self.out_weight_grads)


def _check_handle(handle: Handle, runtime_id: int) -> None:
    if not isinstance(handle, Handle):
        raise ConfigError(f"handle is a {type(handle).__name__}, not a Handle")
    if handle._runtime_id != runtime_id:
        raise ConfigError("the handle belongs to another Runtime")


def _check_rows(x: Any, scales: Any, fp8: str | None, hidden: int, num_tokens: int | None) -> tuple[Rows, Rows]:
    """x and scales of a dispatch."""
    count = "num_tokens" if num_tokens is None else str(num_tokens)
    meaning = f"[{count}, hidden={hidden}]"
    rows = require_rows(x, "x", dtypes=tuple(DTYPE_CODES), shape=(num_tokens, hidden), meaning=meaning)
    if fp8 is not None and (not isinstance(fp8, str) or fp8 not in _CASTS):
        raise ConfigError(f'fp8={fp8!r} is not None, "fp32" or "pow2"')
    is_fp8 = rows.dtype == "float8_e4m3fn"
    if is_fp8 and fp8 is not None:
        raise ConfigError(f"x is float8_e4m3fn already; fp8={fp8!r} would cast it again")
    if is_fp8 != (scales is not None):
        raise ConfigError(f"x of dtype {rows.dtype} comes {'without' if is_fp8 else 'with'} scales")
    blocks = num_scales(hidden) if is_fp8 or fp8 is not None else 0
    checked = optional_array(
        scales, "scales", dtypes=("float32",), shape=(rows.shape[0], blocks), meaning=f"[{rows.shape[0]}, {blocks}]"
    )
    return rows, checked


def _check_routing(topk_idx: Any, topk_weights: Any, num_tokens: int, num_topk: int) -> tuple[Rows, Rows]:
    if topk_idx is None:
        raise ConfigError("dispatch needs topk_idx or a handle")
    shape, meaning = (num_tokens, num_topk), f"[{num_tokens}, num_topk={num_topk}]"
    idx = require_rows(topk_idx, "topk_idx", dtypes=("int64",), shape=shape, meaning=meaning)
    weights = optional_array(topk_weights, "topk_weights", dtypes=("float32",), shape=shape, meaning=meaning)
    return idx, weights


def reason_of(error: Exception) -> str:
    """What all ranks are told. Also of errors that nobody foresaw: to raise them here would strand the other ranks."""
    text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
    # It travels in a field of fixed size, which must not cut a character in two.
    return text.encode("ascii", "backslashreplace").decode()


def _layout_of(layout: Layout | str) -> Layout:
    try:
        return Layout(layout)
    except ValueError:
        raise ConfigError(f'layout={layout!r} is not "grouped" or "rows"') from None


def prepare_dispatch(engine: Any, config: RuntimeConfig, runtime_id: int, call: DispatchCall) -> PendingDispatch:
    """Checks a dispatch (see `Runtime.dispatch`) and makes it ready to submit; a failed check in its place."""
    empty = Rows(0, "int64", (), None)
    handle, fp8 = call.handle, call.fp8
    alignment = config.expert_alignment if call.expert_alignment is None else call.expert_alignment
    try:
        if call.regime != "throughput":
            raise ConfigError(f"regime={call.regime!r} is for CUDA tensors; the CPU executor has one regime")
        if call.capacity is not None:
            raise ConfigError(f"capacity={call.capacity} is for CUDA tensors; the CPU executor knows the sizes")
        if handle is not None:
            _check_handle(handle, runtime_id)
            if call.topk_idx is not None or call.topk_weights is not None:
                raise ConfigError("dispatch by handle takes no topk_idx and no topk_weights")
        layout = handle.layout if handle is not None else _layout_of(call.layout)
        if not isinstance(alignment, int) or not 1 <= alignment < 2**31:
            raise ConfigError(f"expert_alignment={alignment!r} is not an integer in 1..2^31-1")
        framework = framework_of(call.x, "x")
        num_tokens = None if handle is None else handle.num_tokens
        rows, scale_rows = _check_rows(call.x, call.scales, fp8, config.hidden, num_tokens)
        idx, weights = (
            (empty, empty)
            if handle is not None
            else _check_routing(call.topk_idx, call.topk_weights, rows.shape[0], config.num_topk)
        )
    except Exception as error:
        refuse = partial(engine.reject, reason_of(error))
        return PendingDispatch(runtime_id, refuse, Framework("numpy"), "float32", 0, 0, Layout.GROUPED, None, ())
    submit = partial(
        engine.dispatch,
        rows.address,
        scale_rows.address,
        idx.address,
        weights.address,
        rows.shape[0],
        DTYPE_CODES[rows.dtype],
        _CASTS[fp8],
        _LAYOUTS[layout],
        alignment,
        None if handle is None else handle._native,
    )
    dtype = rows.dtype if fp8 is None else "float8_e4m3fn"
    inputs = (rows.owner, scale_rows.owner, idx.owner, weights.owner)
    return PendingDispatch(runtime_id, submit, framework, dtype, config.hidden, config.num_topk, layout, handle, inputs)


def prepare_combine(engine: Any, config: RuntimeConfig, runtime_id: int, call: CombineCall) -> PendingCombine:
    """Checks a combine (see `Runtime.combine`) and makes it ready to submit; a failed check in its place."""
    handle, has_grads = call.handle, call.weight_grads is not None
    try:
        _check_handle(handle, runtime_id)
        framework = framework_of(call.y, "y")
        num_rows, num_topk = handle.num_rows, config.num_topk
        rows = require_rows(
            call.y,
            "y",
            dtypes=("float32", "bfloat16"),
            shape=(num_rows, config.hidden),
            meaning=f"[num_rows={num_rows}, hidden={config.hidden}]",
        )
        row_weights = optional_array(
            call.weights, "weights", dtypes=("float32",), shape=(num_rows,), meaning=f"[num_rows={num_rows}]"
        )
        grad_shape = (num_rows,) if handle.layout is Layout.GROUPED else (num_rows, num_topk)
        grads = optional_array(
            call.weight_grads, "weight_grads", dtypes=("float32",), shape=grad_shape, meaning=str(list(grad_shape))
        )
        out = framework.empty((handle.num_tokens, config.hidden), rows.dtype)
        out_grads = framework.empty((handle.num_tokens, num_topk), "float32") if has_grads else None
    except Exception as error:
        return PendingCombine(runtime_id, partial(engine.reject, reason_of(error)), None, None, ())
    submit = partial(
        engine.combine,
        handle._native,
        rows.address,
        row_weights.address,
        has_grads,
        grads.address,
        framework.rows(out, "out").address,
        0 if out_grads is None else framework.rows(out_grads, "out_weight_grads").address,
        DTYPE_CODES[rows.dtype],
    )
    return PendingCombine(runtime_id, submit, out, out_grads, (rows.owner, row_weights.owner, grads.owner))
