"""Arguments of the kernels of casts, in their memory layout; `params.layout_checks` compares them."""

from __future__ import annotations

import ctypes
from ctypes import c_uint32
from typing import Any

__all__ = [
    "CastE5m6Call",
    "CastRowsCall",
    "CastWeightCall",
    "Fp8Pointers",
    "RetileCall",
    "SwigluAgainCall",
    "SwigluBackwardCall",
    "SwigluCall",
    "UncastE5m6Call",
]

_POINTER = ctypes.c_void_p


def _words(*names: str) -> list[tuple[str, Any]]:
    return [(name, c_uint32) for name in names]


class Fp8Pointers(ctypes.Structure):
    """Fp8Out and Fp8In."""

    _fields_ = [("q", _POINTER), ("scales", _POINTER)]


class CastRowsCall(ctypes.Structure):
    _fields_ = [("x", _POINTER), ("out", Fp8Pointers), *_words("num_rows", "hidden", "dtype", "cast")]


class CastWeightCall(ctypes.Structure):
    _fields_ = [
        ("w", _POINTER),
        ("out", Fp8Pointers),
        *_words("num_experts", "rows", "columns", "dtype", "cast", "is_turned"),
    ]


class RetileCall(ctypes.Structure):
    _fields_ = [("x", Fp8Pointers), ("out", Fp8Pointers), *_words("num_rows", "hidden", "cast", "is_turned")]


class CastE5m6Call(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("x", "packed", "scales")),
        *_words("num_rows", "hidden", "dtype", "reserved"),
    ]


class UncastE5m6Call(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("packed", "scales", "x")),
        *_words("num_rows", "hidden", "dtype", "reserved"),
    ]


class SwigluCall(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("gate", "up", "row_weights")),
        *((name, Fp8Pointers) for name in ("inner", "kept_gate", "kept_up")),
        *_words("num_rows", "width", "dtype", "reserved"),
    ]


class SwigluAgainCall(ctypes.Structure):
    _fields_ = [
        ("gate", Fp8Pointers),
        ("up", Fp8Pointers),
        ("row_weights", _POINTER),
        ("inner", Fp8Pointers),
        *_words("num_rows", "width"),
    ]


class SwigluBackwardCall(ctypes.Structure):
    _fields_ = [
        ("grad_inner", _POINTER),
        ("gate", Fp8Pointers),
        ("up", Fp8Pointers),
        ("row_weights", _POINTER),
        ("grad_gate", Fp8Pointers),
        ("grad_up", Fp8Pointers),
        ("grad_row_weights", _POINTER),
        *_words("num_rows", "width", "dtype", "reserved"),
    ]
