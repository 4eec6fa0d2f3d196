"""Routed experts on rows as dispatch delivers them."""

from commlib.experts.fp8_swiglu import SwiGLUWeights, fp8_swiglu
from commlib.experts.weight_casts import WeightCasts

__all__ = ["SwiGLUWeights", "WeightCasts", "fp8_swiglu"]
