"""How many ranks the GPU tests start."""

from __future__ import annotations

import torch

__all__ = ["ranks"]


def ranks(*counts: int) -> list[int]:
    """`counts`, and 8 where each of 8 has a GPU of its own: with fewer they would only take turns."""
    return [*counts, 8] if torch.cuda.device_count() >= 8 else [*counts]
