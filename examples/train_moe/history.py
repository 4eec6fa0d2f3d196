"""The record of a run: one JSON line per step, so that a resumed run goes on in the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples.train_moe.train import StepReport


class History:
    """`metrics.jsonl` in the output directory; on rank 0 only."""

    def __init__(self, path: Path, first_step: int) -> None:
        """Keeps the lines before `first_step` and drops those which the run is about to make again."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self.read(path) if line["step"] < first_step] if path.exists() else []
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def add(self, report: StepReport) -> None:
        """Appends one step."""
        line = report._asdict() | {"load": report.load.tolist()}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All steps, each with the fields of StepReport."""
        return [json.loads(line) for line in path.read_text().splitlines()]
