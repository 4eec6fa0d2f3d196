"""The command `commlib`: info, bench, plan and trace."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from commlib.errors import CommError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status."""
    from commlib.cli import bench, info, plan, trace

    parser = argparse.ArgumentParser(prog="commlib", description="Distributed MoE dispatch and combine.")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (info, bench, plan, trace):
        module.add_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except CommError as error:
        print(f"commlib {arguments.command}: {error}", file=sys.stderr, flush=True)
        return 1
    return status
