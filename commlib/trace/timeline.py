"""A picture of a trace: a row for each lane of each rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from commlib.errors import ConfigError
from commlib.trace.spans import LANES, Span

__all__ = ["plot_timeline"]

_COLOURS = {"step": "0.85", "compute": "C2", "dispatch": "C0", "forward": "C4", "combine": "C1"}


def plot_timeline(ranks: Mapping[int, Iterable[Span]], path: Path) -> None:
    """Writes a PNG; milliseconds from left to right.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        # Not pyplot: that would set up a display, and change what the caller has set up.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("the picture of a trace needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(14, 1.2 + 0.22 * len(LANES) * len(ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels: list[str] = []
    for rank, spans in sorted(ranks.items()):
        spans = list(spans)
        for lane in LANES:
            bars = [(1e3 * each.begin_s, 1e3 * (each.end_s - each.begin_s)) for each in spans if each.lane == lane]
            # Edges of the same width in pixels keep short spans visible, and long ones apart.
            axes.broken_barh(bars, (len(labels) - 0.4, 0.8), facecolors=_COLOURS[lane], edgecolors="0.3", linewidth=0.2)
            labels.append(f"rank {rank}: {lane}" if lane == LANES[0] else lane)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("ms")
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
