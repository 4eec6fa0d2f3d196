"""A trace of two training steps on four ranks and two nodes: where every span lies."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import train_moe_job

from commlib.testing.spawn import check_ranks
from commlib.trace import COMMUNICATION, LANES, Span, overlap_of, read_trace
from examples.train_moe.tracing import StepTrace

pytestmark = pytest.mark.multirank

MICRO_BATCHES = 2
# Of one step: each micro-batch crosses each MoE layer (trunk and MTP) forward and backward.
OPERATIONS = MICRO_BATCHES * train_moe_job.MODEL.num_moe_layers * 2


def traced(out: str, way: str) -> None:
    """Runs on every rank: four steps, the second and third of them traced."""
    with (
        train_moe_job.joined() as ranks,
        train_moe_job.make_trainer(ranks, micro_batches=MICRO_BATCHES, overlap=way) as trainer,
    ):
        tracing = StepTrace(trainer, 2, Path(out))
        for _ in trainer.train(4):
            tracing.after_step()
        assert trainer.runtime.trace is None
        tracing.finish()


def trace_of(way: str, folder: Path) -> dict[int, list[Span]]:
    check_ranks("test_train_moe_trace:traced", 4, args=[str(folder), way], ranks_per_node=2, timeout_s=90)
    assert (folder / "trace.png").read_bytes().startswith(b"\x89PNG")
    ranks = read_trace(folder / "trace.json")
    assert sorted(ranks) == [0, 1, 2, 3]
    for spans in ranks.values():
        check_places(spans)
    return ranks


def check_places(spans: list[Span]) -> None:
    """Of one rank: all lanes, everything in its step, parts in their operation, nothing else on top of another."""
    lanes = {
        lane: sorted((span for span in spans if span.lane == lane), key=lambda each: each.begin_s) for lane in LANES
    }
    assert all(lanes.values()), {lane: len(spans) for lane, spans in lanes.items()}
    assert all(span.begin_s <= span.end_s for span in spans)
    steps = lanes["step"]
    assert [step.name for step in steps] == ["step 1", "step 2"]
    assert steps[0].end_s <= steps[1].begin_s
    for span in spans:
        assert sum(is_inside(span, step) for step in steps) == 1, span

    operations = [span for span in spans if span.lane in ("dispatch", "combine") and span.name != "exchange"]
    for step in steps:
        for lane in ("dispatch", "combine"):
            assert len([each for each in operations if each.lane == lane and is_inside(each, step)]) == OPERATIONS
    check_disjoint(operations)  # one at a time, in the order of the queue
    check_disjoint(lanes["compute"])
    exchanges = [span for span in spans if span.name == "exchange"]
    assert len(exchanges) >= len(operations)
    for part in exchanges + lanes["forward"]:
        (around,) = [each for each in operations if is_inside(part, each)]
        assert part.lane in (around.lane, "forward"), (part, around)


def is_inside(part: Span, whole: Span) -> bool:
    return whole.begin_s <= part.begin_s and part.end_s <= whole.end_s


def check_disjoint(spans: list[Span]) -> None:
    spans = sorted(spans, key=lambda each: each.begin_s)
    for one, other in itertools.pairwise(spans):
        assert one.end_s <= other.begin_s, (one, other)


def test_without_overlap_no_communication_lies_under_computation(tmp_path: Path) -> None:
    for spans in trace_of("none", tmp_path).values():
        assert {span.name for span in spans if span.lane == "compute"} == {"forward, backward", "optimizer"}
        overlap = overlap_of(spans)
        assert overlap.hidden_s == 0 and overlap.communication_s > 0


def test_with_overlap_some_does_and_computation_is_named_by_the_schedule(tmp_path: Path) -> None:
    for spans in trace_of("pairs", tmp_path).values():
        names = {span.name for span in spans if span.lane == "compute"}
        assert {"mlp(F) batch 0 layer 0", "attention(W) batch 1 layer 1", "optimizer"} <= names, names
        overlap = overlap_of(spans)
        assert 0 < overlap.hidden_s < overlap.communication_s
        communication = [span for span in spans if span.lane in COMMUNICATION]
        assert overlap.communication_s <= sum(span.end_s - span.begin_s for span in communication)
