"""`fp8_swiglu` as a compiled function calls it while casts are kept: outside of every graph.

Imported only when something is being compiled, because ``torch.compiler`` takes more than a second to load.
"""

from __future__ import annotations

import torch

from commlib.experts.fp8_swiglu import swiglu_linked

__all__ = ["swiglu_eagerly"]

_REASON = "keeping casts is a side effect, which a graph has not"

swiglu_eagerly = torch.compiler.disable(swiglu_linked, reason=_REASON)  # type: ignore[no-untyped-call]
