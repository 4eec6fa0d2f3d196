"""`ops` as a compiled function calls it: outside of every graph.

Imported only when something is being compiled, because ``torch.compiler`` takes more than a second to load.
"""

from __future__ import annotations

import torch

from commlib.ops import combine_linked, dispatch_linked

__all__ = ["combine_eagerly", "dispatch_eagerly"]

_REASON = "all ranks issue communication in one order, which a compiler must not change"

dispatch_eagerly = torch.compiler.disable(dispatch_linked, reason=_REASON)  # type: ignore[no-untyped-call]
combine_eagerly = torch.compiler.disable(combine_linked, reason=_REASON)  # type: ignore[no-untyped-call]
