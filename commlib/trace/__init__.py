"""When a rank computed and when its rows travelled: spans, their file, the overlap that they show.

>>> trace = runtime.start_trace()  # doctest: +SKIP
... with trace.step("step 7"), trace.compute("forward, backward"):
...     loss_of(batch).backward()
... spans = runtime.take_trace()

Lanes of a rank: ``step``; ``compute``, what the caller does between waits for the Runtime; ``dispatch`` and
``combine``, operations from where the executor begins them to their end (of their exchange there is a span inside);
``forward``, the part of an operation that passes rows on between nodes. On CPUs times are those of the host, on GPUs
those of the streams. Chrome (chrome://tracing) and Perfetto (ui.perfetto.dev) show the file.
"""

from __future__ import annotations

from commlib.trace.chrome import read_trace, write_trace
from commlib.trace.overlapping import Overlap, describe_overlap, overlap_of
from commlib.trace.recorder import Clock, HostClock, Recorder
from commlib.trace.spans import COMMUNICATION, LANES, Span, lane_of
from commlib.trace.traced_executor import TracedExecutor

__all__ = [
    "COMMUNICATION",
    "LANES",
    "Clock",
    "HostClock",
    "Overlap",
    "Recorder",
    "Span",
    "TracedExecutor",
    "describe_overlap",
    "lane_of",
    "overlap_of",
    "read_trace",
    "write_trace",
]
