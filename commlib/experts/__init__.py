"""Routed experts on rows as dispatch delivers them."""

from commlib.experts.fp8_swiglu import SwiGLUWeights, fp8_swiglu
from commlib.experts.weight_casts import keep_weight_casts

__all__ = ["SwiGLUWeights", "fp8_swiglu", "keep_weight_casts"]
