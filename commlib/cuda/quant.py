"""The casts of `commlib.quant` as kernels, for CUDA tensors: same names, same arguments, same results.

Bit for bit where the arithmetic is the same: casts, kept inputs. The exponential is CUDA's, and sums over a row have an
order of their own. Each call is one kernel on the current stream; nobody waits, nothing is allocated but the results.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from commlib.cuda.calls import aligned
from commlib.cuda.driver import Kernel
from commlib.cuda.quant_params import (
    CastE5m6Call,
    CastRowsCall,
    CastWeightCall,
    Fp8Pointers,
    RetileCall,
    SwigluAgainCall,
    SwigluBackwardCall,
    SwigluCall,
    UncastE5m6Call,
)
from commlib.cuda.units import launch_on, load_on
from commlib.errors import ConfigError
from commlib.layout import SCALE_BLOCK
from commlib.quant import Fp8Rows
from commlib.quant.swiglu import SwiGLUGrads, SwiGLURows

__all__ = [
    "cast_rows",
    "dequantize_e5m6",
    "quantize_e5m6",
    "quantize_weight",
    "retile_columns",
    "swiglu_again",
    "swiglu_backward",
    "swiglu_cast",
]

_CAST_FP32, _CAST_POW2 = 1, 2  # Cast in native/cuda/params.cuh
_ROW_THREADS, _TILE_THREADS = 512, 256
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def cast_rows(x: Tensor, *, num_sms: int | None = None) -> Fp8Rows:
    """`commlib.quant.swiglu.cast_rows`; num_sms: multiprocessors to use, None = all."""
    x = _checked(x, "x")
    out = _empty_rows(x.shape, x)
    call = CastRowsCall(
        x=x.data_ptr(), out=_pointers(out), num_rows=len(x), hidden=x.shape[1], dtype=_DTYPES[x.dtype], cast=_CAST_POW2
    )
    _launch_rows("cast_rows", call, x, num_sms)
    return out


def swiglu_cast(gate: Tensor, up: Tensor, row_weights: Tensor, *, num_sms: int | None = None) -> SwiGLURows:
    """`commlib.quant.swiglu.swiglu_cast`."""
    gate, up = _checked(gate, "gate"), _checked(up, "up", like=gate)
    found = SwiGLURows(*(_empty_rows(gate.shape, gate) for _ in range(3)))
    call = SwigluCall(
        gate=gate.data_ptr(),
        up=up.data_ptr(),
        row_weights=_weights(row_weights, gate).data_ptr(),
        inner=_pointers(found.inner),
        kept_gate=_pointers(found.gate),
        kept_up=_pointers(found.up),
        num_rows=len(gate),
        width=gate.shape[1],
        dtype=_DTYPES[gate.dtype],
    )
    _launch_rows("swiglu_cast", call, gate, num_sms)
    return found


def swiglu_again(gate: Fp8Rows, up: Fp8Rows, row_weights: Tensor, *, num_sms: int | None = None) -> Fp8Rows:
    """`commlib.quant.swiglu.swiglu_again`."""
    out = _empty_rows(gate.shape, gate)
    call = SwigluAgainCall(
        gate=_pointers(gate),
        up=_pointers(up),
        row_weights=_weights(row_weights, gate).data_ptr(),
        inner=_pointers(out),
        num_rows=len(gate),
        width=gate.shape[1],
    )
    _launch_rows("swiglu_again", call, gate, num_sms)
    return out


def swiglu_backward(
    grad: Tensor, gate: Fp8Rows, up: Fp8Rows, row_weights: Tensor, *, num_sms: int | None = None
) -> SwiGLUGrads:
    """`commlib.quant.swiglu.swiglu_backward`."""
    grad = _checked(grad, "grad", like=gate)
    found = SwiGLUGrads(
        _empty_rows(gate.shape, gate),
        _empty_rows(gate.shape, gate),
        torch.empty(len(gate), dtype=torch.float32, device=gate.device),
    )
    call = SwigluBackwardCall(
        grad_inner=grad.data_ptr(),
        gate=_pointers(gate),
        up=_pointers(up),
        row_weights=_weights(row_weights, gate).data_ptr(),
        grad_gate=_pointers(found.gate),
        grad_up=_pointers(found.up),
        grad_row_weights=found.row_weights.data_ptr(),
        num_rows=len(gate),
        width=gate.shape[1],
        dtype=_DTYPES[grad.dtype],
    )
    _launch_rows("swiglu_backward", call, gate, num_sms)
    return found


def quantize_weight(w: Tensor, *, pow2: bool = False, num_sms: int | None = None) -> tuple[Tensor, Tensor]:
    """`commlib.quant.quantize_weight` for [E, N, K] or [N, K], K a multiple of 8. `w.mT` costs no pass of its own if N
    and K are multiples of 128; the results are contiguous in any case."""
    if w.ndim not in (2, 3) or w.dtype not in _DTYPES or w.shape[-1] % 8:
        raise ConfigError(f"w is {w.dtype} {list(w.shape)}, the rule: bfloat16 or float32 [.., rows, columns / 8]")
    w = w.detach()
    *experts, rows, columns = w.shape
    tiles = (-(-rows // SCALE_BLOCK), -(-columns // SCALE_BLOCK))
    q = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    scales = torch.empty((*experts, *tiles), dtype=torch.float32, device=w.device)
    is_turned = not (w.is_contiguous() or rows % SCALE_BLOCK or columns % SCALE_BLOCK) and w.mT.is_contiguous()
    w = aligned(w.mT if is_turned else w)
    call = CastWeightCall(
        w=w.data_ptr(),
        out=Fp8Pointers(q.data_ptr(), scales.data_ptr()),
        num_experts=experts[0] if experts else 1,
        rows=w.shape[-2],
        columns=w.shape[-1],
        dtype=_DTYPES[w.dtype],
        cast=_CAST_POW2 if pow2 else _CAST_FP32,
        is_turned=is_turned,
    )
    _launch("cast_weight", call, w.device, scales.numel(), _TILE_THREADS, num_sms)
    return q, scales


def retile_columns(
    q: Tensor, scales: Tensor, *, pow2: bool = True, turned: bool = False, num_sms: int | None = None
) -> tuple[Tensor, Tensor]:
    """`commlib.quant.retile_columns`."""
    rows = Fp8Rows(q, scales, torch.float32)  # checks the shapes
    num_tokens, hidden = q.shape
    if num_tokens % SCALE_BLOCK:
        raise ConfigError(f"num_tokens={num_tokens} is no multiple of {SCALE_BLOCK}")
    out = q.new_empty((hidden, num_tokens) if turned else (num_tokens, hidden))
    out_scales = torch.empty(num_tokens // SCALE_BLOCK, hidden, dtype=torch.float32, device=q.device)
    call = RetileCall(
        x=_pointers(rows),
        out=Fp8Pointers(out.data_ptr(), out_scales.data_ptr()),
        num_rows=num_tokens,
        hidden=hidden,
        cast=_CAST_POW2 if pow2 else _CAST_FP32,
        is_turned=turned,
    )
    tiles = num_tokens // SCALE_BLOCK * (hidden // SCALE_BLOCK)
    _launch("retile_columns", call, q.device, tiles, _TILE_THREADS, num_sms)
    return out, out_scales


def quantize_e5m6(x: Tensor, *, num_sms: int | None = None) -> tuple[Tensor, Tensor]:
    """`commlib.quant.quantize_e5m6`; a NaN loses its sign."""
    x = _checked(x, "x")
    num_rows, hidden = x.shape
    packed = torch.empty(num_rows, hidden // 2 * 3, dtype=torch.uint8, device=x.device)
    scales = torch.empty(num_rows, hidden // SCALE_BLOCK, dtype=torch.float32, device=x.device)
    pointers = (x.data_ptr(), packed.data_ptr(), scales.data_ptr())
    _launch_rows("cast_e5m6", CastE5m6Call(*pointers, num_rows, hidden, _DTYPES[x.dtype]), x, num_sms)
    return packed, scales


def dequantize_e5m6(packed: Tensor, scales: Tensor, dtype: torch.dtype, *, num_sms: int | None = None) -> Tensor:
    """`commlib.quant.dequantize_e5m6`, to BF16 or FP32."""
    num_rows, blocks = scales.shape
    hidden = blocks * SCALE_BLOCK
    kinds = (packed.dtype, scales.dtype, packed.device)
    if kinds != (torch.uint8, torch.float32, scales.device) or dtype not in _DTYPES:
        raise ConfigError(f"{packed.dtype} and {scales.dtype} to {dtype}, the rule: uint8 and float32 of one device")
    if tuple(packed.shape) != (num_rows, hidden // 2 * 3):
        raise ConfigError(f"packed has shape {list(packed.shape)}, the rule: [{num_rows}, {hidden // 2 * 3}]")
    packed, scales = aligned(packed), scales.contiguous()
    x = torch.empty(num_rows, hidden, dtype=dtype, device=packed.device)
    pointers = (packed.data_ptr(), scales.data_ptr(), x.data_ptr())
    _launch_rows("uncast_e5m6", UncastE5m6Call(*pointers, num_rows, hidden, _DTYPES[dtype]), x, num_sms)
    return x


@cache
def _load(device_index: int) -> dict[str, Kernel]:
    names = {
        "quant": ("cast_rows", "cast_weight", "retile_columns"),
        "e5m6": ("cast_e5m6", "uncast_e5m6"),
        "swiglu": ("swiglu_cast", "swiglu_again", "swiglu_backward"),
    }
    return load_on(device_index, {unit: dict.fromkeys(each, 0) for unit, each in names.items()})


def _launch_rows(name: str, call: Any, rows: Tensor, num_sms: int | None) -> None:
    _launch(name, call, rows.device, -(-len(rows) // (_ROW_THREADS // 32)), _ROW_THREADS, num_sms)


def _launch(name: str, call: Any, device: torch.device, blocks: int, threads: int, num_sms: int | None) -> None:
    if blocks == 0:
        return
    # Two blocks of a multiprocessor hide each other's loads.
    most = 2 * (num_sms or torch.cuda.get_device_properties(device).multi_processor_count)
    index = torch.cuda.current_device() if device.index is None else device.index
    launch_on(index, _load(index)[name], min(most, blocks), threads, 0, call)


def _pointers(rows: Fp8Rows) -> Fp8Pointers:
    for each in (rows.fp8, rows.scales):
        if not each.is_contiguous() or each.data_ptr() % 8:
            raise ConfigError("FP8 rows and scales have to be contiguous, rows at addresses that are multiples of 8")
    return Fp8Pointers(rows.fp8.data_ptr(), rows.scales.data_ptr())


def _empty_rows(shape: Any, like: Tensor) -> Fp8Rows:
    num_rows, width = shape
    fp8 = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=like.device)
    scales = torch.empty(num_rows, width // SCALE_BLOCK, dtype=torch.float32, device=like.device)
    return Fp8Rows(fp8, scales, like.dtype)


def _checked(x: Tensor, name: str, like: Tensor | None = None) -> Tensor:
    if x.ndim != 2 or x.dtype not in _DTYPES or x.shape[1] % SCALE_BLOCK:
        raise ConfigError(f"{name} is {x.dtype} {list(x.shape)}, the rule: bfloat16 or float32 [rows, columns / 128]")
    if like is not None and (x.shape != like.shape or x.dtype != like.dtype or x.device != like.device):
        raise ConfigError(f"{name} is {x.dtype} {list(x.shape)} on {x.device}, the rule: like the other rows")
    return aligned(x.detach())


def _weights(row_weights: Tensor, rows: Tensor) -> Tensor:
    if row_weights.shape != (len(rows),) or row_weights.dtype != torch.float32 or row_weights.device != rows.device:
        raise ConfigError(
            f"row_weights is {row_weights.dtype} {list(row_weights.shape)} on {row_weights.device}, the rule: float32 "
            f"[{len(rows)}] on {rows.device}"
        )
    return row_weights.detach().contiguous()
