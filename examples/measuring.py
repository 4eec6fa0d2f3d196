"""What the comparisons of this folder share: time as ranks see it, and how far two results are apart."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from commlib import bootstrap


class Stopwatch:
    """Moments of one rank: on GPUs events on the current stream, otherwise the host's clock."""

    def __init__(self, device_type: str) -> None:
        self._is_cuda = device_type == "cuda"
        self._marks: list[float | torch.cuda.Event] = []

    def mark(self) -> None:
        """Now."""
        self._marks.append(torch.cuda.Event(enable_timing=True) if self._is_cuda else time.perf_counter())
        if self._is_cuda:
            self._marks[-1].record()

    def take(self) -> list[float]:
        """Seconds from each mark to the next one, which are forgotten; waits for the GPU."""
        marks, self._marks = self._marks, []
        if self._is_cuda:
            marks[-1].synchronize()
            return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(marks)]
        return [end - begin for begin, end in itertools.pairwise(marks)]


def gathered(ranks: bootstrap.Bootstrap, values: list[float]) -> list[list[float]]:
    """Of every rank."""
    return [json.loads(blob) for blob in ranks.allgather(json.dumps(values).encode(), timeout_s=60)]


def slowest_median(ranks: bootstrap.Bootstrap, times: list[float]) -> float:
    """Of each turn the slowest rank's time; of these the median. Collective."""
    return median(max(each) for each in zip(*gathered(ranks, times), strict=True))


def median(values: Iterable[float]) -> float:
    """The upper one of an even number."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; of zeros, 0 if zeros were found, else infinity."""
    error, scale = (
        float(torch.linalg.vector_norm(each, dtype=torch.float64))
        for each in (found.float() - expected.float(), expected)
    )
    return error / scale if scale else float("inf") if error else 0.0
