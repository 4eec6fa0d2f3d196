"""Tables for docs/performance.md from the JSON lines of `commlib bench --device cuda --json`.

python tests/perf/scaling.py figures.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Line = dict[str, Any]

_NAMES = ("dispatch", "combine", "nccl dispatch", "nccl combine")


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def tables(lines: Iterable[Line]) -> str:
    """A table for each workload and number of tokens; a row for each number of ranks and multiprocessors.

    Times are medians of the slowest rank in microseconds. "ns/row": of a dispatch in layout "grouped" per row that the
    busiest rank sends to others. "of limit": of a plain push of the same bytes.
    """
    groups: dict[tuple[str, int, str], dict[tuple[int, int], dict[str, Line]]] = {}
    for line in lines:
        group = groups.setdefault((line["workload"], line["num_tokens"], line["device"]), {})
        name = line["what"] if line["what"] not in _NAMES else f"{line['what']} {line['layout']} {line['dtype']}"
        # Of several runs the last counts.
        group.setdefault((line["num_ranks"], line["sms"]), {})[name] = line
    return "\n\n".join(_table(*key, group) for key, group in groups.items())


def _table(workload: str, num_tokens: int, device: str, group: dict[tuple[int, int], dict[str, Line]]) -> str:
    head = (
        f"{device}, {workload}, {num_tokens} tokens per rank\n\n"
        "| ranks | SMs | dispatch | ns/row | of limit | NCCL / ours | combine | of limit | NCCL / ours | FP8 dispatch "
        "| host dispatch | host combine | registered MiB |\n|" + "---|" * 13
    )
    return "\n".join([head, *(_row(*key, figures) for key, figures in sorted(group.items()))])


def _row(num_ranks: int, num_sms: int, figures: dict[str, Line]) -> str:
    dispatch, combine = figures.get("dispatch grouped bf16"), figures.get("combine grouped bf16")
    cells = [str(num_ranks), str(num_sms)]
    cells += [_value(dispatch, "us"), _per_row(dispatch), _value(dispatch, "of_push_limit")]
    cells += [_ratio(figures.get("nccl dispatch grouped bf16"), dispatch)]
    cells += [_value(combine, "us"), _value(combine, "of_push_limit")]
    cells += [_ratio(figures.get("nccl combine grouped bf16"), combine)]
    cells += [_value(figures.get("dispatch grouped fp8"), "us")]
    cells += [_value(figures.get("host dispatch"), "us"), _value(figures.get("host combine"), "us")]
    memory = figures.get("memory")
    cells += ["-" if memory is None else f"{memory['registered_bytes'] / 2**20:.1f}"]
    return f"| {' | '.join(cells)} |"


def _value(line: Line | None, name: str) -> str:
    return "-" if line is None or line.get(name) is None else f"{line[name]:g}"


def _per_row(line: Line | None) -> str:
    if line is None or not line.get("gb_s"):
        return "-"
    row_bytes = line["hidden"] * 2
    return f"{row_bytes / line['gb_s']:.1f}"  # bytes / (bytes per nanosecond)


def _ratio(theirs: Line | None, ours: Line | None) -> str:
    return "-" if theirs is None or ours is None else f"{theirs['us'] / ours['us']:.2f}"


if __name__ == "__main__":
    print(tables(read(Path(sys.argv[1]))))
