"""Routed experts on rows as dispatch delivers them."""

from commlib.experts.fp8_swiglu import SwiGLUWeights, fp8_swiglu

__all__ = ["SwiGLUWeights", "fp8_swiglu"]
