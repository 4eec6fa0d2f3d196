"""FP8 weights that are cast once per optimizer step, however many micro-batches use them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from commlib.experts.grouped_gemm import Fp8Weight, quantize_experts

__all__ = ["WeightCasts"]


class _Kept(NamedTuple):
    weight: Tensor  # itself, so that no other can take its place in memory unnoticed
    version: int
    cast: Fp8Weight


class WeightCasts:
    """The casts of the weights of one group of experts, for `fp8_swiglu`.

    Each weight is cast when it is first used, once as it is and once turned (for the gradient of the input), and again
    when torch has seen it change: in-place operations count, assignments through `.data` do not, call `clear` after
    those. Holds two bytes per weight element, as much as a copy in BF16.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, bool], _Kept] = {}

    def get(self, name: str, weight: Tensor, *, turned: bool = False) -> Fp8Weight:
        """FP8 of `weight` [E, N, K], or of `weight.mT` if `turned`.

        Args:
            name: of the weight in the group; a name holds one weight.
        """
        kept = self._kept.get((name, turned))
        if kept is None or kept.weight is not weight or kept.version != weight._version:
            kept = _Kept(weight, weight._version, quantize_experts(weight.mT if turned else weight))
            self._kept[name, turned] = kept
        return kept.cast

    def clear(self) -> None:
        """Forgets all casts: weights have changed in a way that torch does not see, or the memory is needed."""
        self._kept.clear()
