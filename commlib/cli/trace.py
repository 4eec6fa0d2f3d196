"""`commlib trace`: the overlap that a trace shows, and its picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from commlib.trace import describe_overlap, read_trace
from commlib.trace.timeline import plot_timeline

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("trace", help="overlap and picture of a trace that a program has written")
    parser.add_argument("file", type=Path, help="JSON of commlib.trace, e.g. of examples/train_moe --trace")
    parser.add_argument("--png", type=Path, default=None, help="default: beside the file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    ranks = read_trace(arguments.file)
    picture = arguments.png or arguments.file.with_suffix(".png")
    plot_timeline(ranks, picture)
    print(f"{describe_overlap(ranks)}\npicture: {picture}")
    return 0
