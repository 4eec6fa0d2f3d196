"""What makes the result of an autograd function differentiable whatever its other inputs are."""

from __future__ import annotations

import torch

__all__ = ["ANCHOR"]

# Never gets a gradient.
ANCHOR = torch.zeros((), requires_grad=True)
