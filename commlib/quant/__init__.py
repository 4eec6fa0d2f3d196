"""Number formats with scales: activations, weights, and what is kept for the backward pass. Plain torch, any device."""

from commlib.quant.e4m3 import E4M3_MAX, MIN_AMAX, dequantize, quantize_e4m3
from commlib.quant.e5m6 import E5M6_MAX, dequantize_e5m6, quantize_e5m6
from commlib.quant.rows import Fp8Rows
from commlib.quant.swiglu import cast_rows, swiglu_again, swiglu_backward, swiglu_cast
from commlib.quant.tiles import dequantize_columns, dequantize_weight, quantize_weight, retile_columns

__all__ = [
    "E4M3_MAX",
    "E5M6_MAX",
    "MIN_AMAX",
    "Fp8Rows",
    "cast_rows",
    "dequantize",
    "dequantize_columns",
    "dequantize_e5m6",
    "dequantize_weight",
    "quantize_e4m3",
    "quantize_e5m6",
    "quantize_weight",
    "retile_columns",
    "swiglu_again",
    "swiglu_backward",
    "swiglu_cast",
]
