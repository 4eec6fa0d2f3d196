"""DualPipe and DualPipeV as data: complete, free of deadlocks, with the bubble of the paper."""

from __future__ import annotations

from collections import Counter

import pytest

from commlib.errors import ConfigError
from commlib.overlap.pipeline_plan import Action, Kind, Part, PipelinePlan, Place, dualpipe, dualpipe_v

F, B, I, W, PAIR = Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.WEIGHTS, Kind.PAIR  # noqa: E741
COST = {F: 1.0, I: 1.0, W: 1.0, B: 2.0, PAIR: 3.0}

PLANS = [
    *(dualpipe(num_ranks, num_ranks + more) for num_ranks in (2, 4, 6, 8) for more in (0, 1, 5)),
    *(dualpipe_v(num_ranks, 2 * num_ranks + more) for num_ranks in (1, 2, 3, 4, 5) for more in (0, 1, 5)),
]
NAMES = [f"{plan.name}-{plan.num_ranks}-{plan.num_batches}" for plan in PLANS]


def ends(plan: PipelinePlan) -> list[float]:
    """When each rank is done. An action starts when its rank is free and its data is there; transfers take no time."""
    made: dict[tuple[Kind, Place, int], float] = {}
    clock = [0.0] * plan.num_ranks
    places = [0] * plan.num_ranks

    def inputs(rank: int, action: Action) -> list[tuple[Kind, Place, int]]:
        needed = []
        if action.forward is not None and (before := plan.before(Place(rank, action.forward.leg))) is not None:
            needed.append((F, before, action.forward.batch))
        if action.backward is not None and action.kind is not W:
            place = Place(rank, action.backward.leg)
            after = plan.after(place)
            needed.append((F, place, action.backward.batch) if after is None else (B, after, action.backward.batch))
        return needed

    while any(place < len(plan.actions[rank]) for rank, place in enumerate(places)):
        moved = False
        for rank in range(plan.num_ranks):
            while places[rank] < len(plan.actions[rank]):
                action = plan.actions[rank][places[rank]]
                if action.kind in COST:
                    needed = inputs(rank, action)
                    if not all(each in made for each in needed):
                        break
                    clock[rank] = max([clock[rank], *(made[each] for each in needed)]) + COST[action.kind]
                    if action.forward is not None:
                        made[F, Place(rank, action.forward.leg), action.forward.batch] = clock[rank]
                    if action.backward is not None and action.kind is not W:
                        made[B, Place(rank, action.backward.leg), action.backward.batch] = clock[rank]
                places[rank] += 1
                moved = True
        assert moved, f"{plan.name}: deadlock at {places}"
    return clock


@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
def test_every_micro_batch_passes_every_stage_once(plan: PipelinePlan) -> None:
    for actions in plan.actions:
        forward = Counter(action.forward for action in actions if action.kind in (F, PAIR))
        backward = Counter(action.backward for action in actions if action.kind in (B, I, PAIR))
        expected = Counter(Part(leg, batch) for leg in (0, 1) for batch in range(plan.num_batches))
        assert forward == expected and backward == expected
        split = [action.backward for action in actions if action.kind is I]
        assert [action.backward for action in actions if action.kind is W] == split, "in order, so that sums are, too"
        for leg in (0, 1):
            order = [part.batch for a in actions if a.kind in (B, W, PAIR) and (part := a.backward) and part.leg == leg]
            assert order == sorted(order), "weights get their gradients in the order of micro-batches"


@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
def test_transfers_have_two_ends_in_one_order(plan: PipelinePlan) -> None:
    for one in range(plan.num_ranks):
        for other in range(plan.num_ranks):
            mine = [a for a in plan.actions[one] if a.peer == other]
            theirs = [a for a in plan.actions[other] if a.peer == one]
            turned = [
                Kind(a.kind.replace("send", "recv") if "send" in a.kind else a.kind.replace("recv", "send"))
                for a in theirs
            ]
            assert [(a.kind, a.forward, a.backward) for a in mine] == [
                (kind, a.forward, a.backward) for kind, a in zip(turned, theirs, strict=True)
            ]
    for rank, actions in enumerate(plan.actions):
        there: set[tuple[str, Part]] = set()
        for action in actions:
            if action.kind is Kind.RECV_FORWARD and action.forward:
                there.add(("F", action.forward))
            elif action.kind is Kind.RECV_BACKWARD and action.backward:
                there.add(("B", action.backward))
            if action.kind in (F, PAIR) and action.forward:
                before = plan.before(Place(rank, action.forward.leg))
                assert before is None or before.rank == rank or ("F", action.forward) in there
            if action.kind in (B, I, PAIR) and action.backward:
                after = plan.after(Place(rank, action.backward.leg))
                assert after is None or after.rank == rank or ("B", action.backward) in there


@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
def test_bubble_is_that_of_the_paper(plan: PipelinePlan) -> None:
    """(PP / 2 - 1) (F&B + B - 3W) for DualPipe; DualPipeV has it for PP = 2 * ranks. Both legs count as work."""
    depth = plan.num_ranks // 2 if plan.name == "dualpipe" else plan.num_ranks
    bubble = (depth - 1) * (COST[PAIR] + COST[B] - 3 * COST[W])
    work = 2 * plan.num_batches * (COST[F] + COST[B])
    assert max(ends(plan)) == work + bubble


def test_stages() -> None:
    plan = dualpipe(4, 4)
    assert [[plan.stage(Place(rank, leg)) for leg in (0, 1)] for rank in range(4)] == [[0, 3], [1, 2], [2, 1], [3, 0]]
    assert plan.after(Place(3, 0)) is None and plan.before(Place(3, 1)) is None
    plan = dualpipe_v(2, 4)
    assert [[plan.stage(Place(rank, leg)) for leg in (0, 1)] for rank in range(2)] == [[0, 3], [1, 2]]
    assert plan.after(Place(1, 0)) == Place(1, 1) and plan.before(Place(1, 1)) == Place(1, 0)
    assert plan.before(Place(0, 0)) is None and plan.after(Place(0, 1)) is None


def test_prints_numbered_actions() -> None:
    lines = dualpipe_v(2, 4).describe(0).splitlines()
    assert lines[:2] == ["   0  F      leg 0 batch 0", "   1  send F leg 0 batch 0  to rank 1"]
    assert lines[13] == "  13  FB     leg 0 batch 3 | leg 1 batch 1"
    assert any("recv B" in line and line.endswith("from rank 1") for line in lines)


@pytest.mark.parametrize(
    ("make", "ranks", "batches", "message"),
    [
        (dualpipe, 3, 8, "num_ranks=3 of DualPipe is not an even number"),
        (dualpipe, 4, 3, "num_batches=3 per direction is below num_ranks=4"),
        (dualpipe_v, 0, 3, "num_ranks=0 is below 1"),
        (dualpipe_v, 2, 3, "num_batches=3 is below 2 [*] num_ranks=4"),
    ],
)
def test_impossible_numbers(make: object, ranks: int, batches: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(ranks, batches)  # type: ignore[operator]
