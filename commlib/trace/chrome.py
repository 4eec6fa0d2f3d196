"""The file of a trace: JSON in Chrome's trace event format, a process for each rank, a thread for each lane."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from commlib.errors import ConfigError
from commlib.trace.spans import LANES, Span

__all__ = ["read_trace", "write_trace"]


def write_trace(ranks: Mapping[int, Iterable[Span]], path: Path) -> None:
    """Writes the spans of some ranks. The first span of a rank is not earlier than its zero.

    Args:
        ranks: rank -> spans, all ranks' seconds counted from one moment.
        path: of the file; its folder is made.
    """
    events: list[dict[str, Any]] = []
    for rank, spans in ranks.items():
        events.append(_name("process_name", rank, 0, f"rank {rank}"))
        events += [_name("thread_name", rank, lane, name) for lane, name in enumerate(LANES)]
        events += [
            {
                "ph": "X",
                "pid": rank,
                "tid": LANES.index(span.lane),
                "cat": span.lane,
                "name": span.name,
                "ts": 1e6 * span.begin_s,
                "dur": 1e6 * (span.end_s - span.begin_s),
            }
            for span in spans
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def read_trace(path: Path) -> dict[int, list[Span]]:
    """What `write_trace` has written.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        events = json.loads(path.read_text())["traceEvents"]
        ranks: dict[int, list[Span]] = {event["pid"]: [] for event in events}
        for event in events:
            if event["ph"] == "X" and event["cat"] in LANES:
                begin_s = event["ts"] / 1e6
                span = Span(event["cat"], event["name"], begin_s, begin_s + event["dur"] / 1e6)
                ranks[event["pid"]].append(span)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{path} is not a trace of commlib: {type(error).__name__}: {error}") from error
    return ranks


def _name(kind: str, rank: int, lane: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": rank, "tid": lane, "name": kind, "args": {"name": name}}
