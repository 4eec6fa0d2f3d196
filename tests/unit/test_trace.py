"""Traces: what the recorder notes, the file, the overlap worked out by hand, the picture, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commlib import cli
from commlib.cuda.stream_clock import spans_of_marks
from commlib.errors import ConfigError
from commlib.trace import LANES, Overlap, Recorder, Span, describe_overlap, overlap_of, read_trace, write_trace

# Communication: 1..4 (with what lies inside), 6..8 and 7..9 together, 10..11: 3 + 3 + 1 = 7 s.
# Under computation of 0..2, 3..7.5 and 7.5..8: 1..2, 3..4, 6..8 = 4 s.
MADE_UP = [
    Span("step", "step 0", 0.0, 12.0),
    Span("compute", "attention", 0.0, 2.0),
    Span("dispatch", "dispatch", 1.0, 4.0),
    Span("dispatch", "exchange", 1.0, 1.5),
    Span("forward", "forward", 2.0, 3.0),
    Span("compute", "mlp", 3.0, 7.5),
    Span("combine", "combine", 6.0, 8.0),
    Span("dispatch", "dispatch", 7.0, 9.0),
    Span("compute", "optimizer", 7.5, 8.0),
    Span("combine", "combine", 10.0, 11.0),
]


class CountingClock:
    """Every look takes a second; marks stand for the times that they were made at."""

    def __init__(self) -> None:
        self._looks = 0

    def mark(self) -> str:
        self._looks += 1
        return f"mark {self._looks}"

    def seconds(self, mark: str) -> float:
        return float(mark.split()[1])


def test_overlap_of_a_made_up_trace() -> None:
    assert overlap_of(MADE_UP) == Overlap(communication_s=7.0, hidden_s=4.0)
    assert overlap_of(reversed(MADE_UP)).fraction == 4 / 7
    assert overlap_of(span for span in MADE_UP if span.lane != "compute").fraction == 0
    assert overlap_of([Span("compute", "all", 0.0, 1.0)]).fraction == 1


def test_overlap_in_words_weighs_ranks_by_their_communication() -> None:
    other = [Span("dispatch", "dispatch", 0.0, 1.0)]
    text = "overlap: 50.0% of 8000.0 ms of communication lay under computation (rank 0 57.1%, rank 1 0.0%)"
    assert describe_overlap({1: other, 0: MADE_UP}) == text


def test_recorder_cuts_computation_at_waits_and_labels() -> None:
    recorder = Recorder(CountingClock())
    with recorder.step("step 3"), recorder.compute("model"):
        with recorder.waiting():
            pass
        with recorder.labelled("mlp"), recorder.waiting():
            pass
    with recorder.waiting(), recorder.labelled("outside of computation"):
        pass
    assert recorder.spans() == [
        Span("compute", "model", 2.0, 3.0),
        Span("compute", "model", 4.0, 5.0),
        Span("compute", "mlp", 6.0, 7.0),
        Span("compute", "mlp", 8.0, 9.0),
        Span("compute", "model", 10.0, 11.0),
        Span("step", "step 3", 1.0, 12.0),
    ]


def test_kernels_of_a_gpu_get_their_lanes() -> None:
    marks = [(f"{name}", "mark 1", "mark 3") for name in ("dispatch_e4m3", "exchange", "latency_combine", "forward")]
    assert spans_of_marks(marks, CountingClock()) == [
        Span("dispatch", "dispatch_e4m3", 1.0, 3.0),
        Span("combine", "latency_combine", 1.0, 3.0),
        Span("forward", "forward", 1.0, 3.0),
    ]


def test_file_is_what_perfetto_reads(tmp_path: Path) -> None:
    write_trace({0: MADE_UP, 5: MADE_UP[:3]}, tmp_path / "new" / "trace.json")
    events = json.loads((tmp_path / "new" / "trace.json").read_text())["traceEvents"]
    named = {(event["pid"], event["tid"]): event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert named == {(rank, lane): name for rank in (0, 5) for lane, name in enumerate(LANES)}
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"rank 0", "rank 5"}
    (forward,) = [event for event in events if event["ph"] == "X" and event["cat"] == "forward"]
    assert (forward["pid"], named[0, forward["tid"]]) == (0, "forward")
    assert (forward["ts"], forward["dur"]) == (2e6, 1e6)  # microseconds
    assert read_trace(tmp_path / "new" / "trace.json") == {0: MADE_UP, 5: MADE_UP[:3]}


@pytest.mark.parametrize("text", ["", "[]", '{"traceEvents": [{"ph": "X"}]}'])
def test_other_files_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(ConfigError, match="is not a trace of commlib"):
        read_trace(tmp_path / "trace.json")
    assert cli.main(["trace", str(tmp_path / "trace.json")]) == 1
    assert "is not a trace of commlib" in capsys.readouterr().err


def test_command_prints_the_overlap_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_trace({0: MADE_UP}, tmp_path / "trace.json")
    assert cli.main(["trace", str(tmp_path / "trace.json")]) == 0
    assert "overlap: 57.1% of 7000.0 ms" in capsys.readouterr().out
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["trace", str(tmp_path / "trace.json"), "--png", str(tmp_path / "other.png")]) == 0
    assert (tmp_path / "other.png").read_bytes() == (tmp_path / "trace.png").read_bytes()
