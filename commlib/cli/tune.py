"""`commlib bench --tune`: finds chunk and ring sizes, and multiprocessors per role, by trying them.

All ranks try the same plans in the same order: what decides is the time of the slowest rank, which all of them know.
The search starts at the default plan and goes to the neighbour (one value doubled or halved) that is fastest, until
none is. What looks fastest of many has been lucky, too: the end is then measured against the start, several times in
turn, and wins only if it is faster each time, in the median by more than `MARGIN`.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from commlib.config import RuntimeConfig
from commlib.env import read_env
from commlib.errors import CapacityError, ConfigError
from commlib.launch_plan import plan_launch
from commlib.topology import Topology
from commlib.tuned_plans import (
    Plan,
    default_file,
    shape_key,
    store_plan,
    topology_key,
    with_built_in_plan,
)

__all__ = ["MARGIN", "Trial", "default_plan", "printer", "search", "tune"]

MARGIN = 0.03  # of the time: less than that is noise
MAX_TRIALS = 24
_ROUNDS = 5  # in which start and end are measured against one another: equal ones win all of them once in 2^5


class Trial(Protocol):
    """What a device's benchmark offers."""

    rank: int
    device: str  # as plans name it
    topology: Topology
    config: RuntimeConfig  # that of a Runtime with the default plan: as the environment and the ranks have it

    def seconds(self, config: RuntimeConfig) -> float:
        """Dispatch and combine in a Runtime with this config: median over iterations of the slowest rank. Collective.

        Raises:
            CapacityError, ConfigError: on all ranks, the plan does not fit.
        """


def tune(trial: Trial, show: Callable[[str], None]) -> Plan:
    """Searches, stores what it finds and returns it. Collective; `show` gets lines on rank 0."""
    start = default_plan(trial)
    if not start:
        show("nothing to tune: what could be is set in the environment, or this is one node of GPUs")
        return {}

    def seconds(plan: Plan) -> float:
        try:
            time = trial.seconds(dataclasses.replace(trial.config, **plan))  # type: ignore[arg-type]
        except (CapacityError, ConfigError) as error:
            show(f"  {_text(plan)}  does not fit: {error}")
            return float("inf")
        show(f"  {_text(plan)}  {time * 1e3:9.3f} ms")
        return time

    best = search(start, seconds)
    if best != start:
        show("the default plan and the fastest once more, in turn:")
        if not _is_faster(best, start, seconds, show):
            best = start
    if trial.rank == 0:
        named = read_env().plans
        path = default_file() if named in (None, "off") else Path(str(named))
        show("the default plan stays" if best == start else f"plan: {_text(best)}")
        network = topology_key(trial.topology, trial.config.transport)
        store_plan(path, shape_key(trial.config, trial.device), network, best)
        show(f"stored in {path}")
    return best


def _is_faster(best: Plan, start: Plan, seconds: Callable[[Plan], float], show: Callable[[str], None]) -> bool:
    pairs = []
    for turn in range(_ROUNDS):
        if turn % 2:  # either goes first now and then: a machine that gets slower favours neither
            after, before = seconds(best), seconds(start)
        else:
            before, after = seconds(start), seconds(best)
        pairs.append((before, after))
    wins = sum(after < before for before, after in pairs)
    ratio = statistics.median(after / before for before, after in pairs)
    show(f"faster than the default plan {wins} times of {_ROUNDS}, in the median {ratio:.3f} of its time")
    return wins == _ROUNDS and ratio < 1 - MARGIN


def default_plan(trial: Trial) -> Plan:
    """What may be tuned, with the values that hold without tuning; what the environment sets may not."""
    config, is_cpu, has_network = trial.config, trial.device == "cpu", trial.topology.num_nodes > 1
    plan = {}
    if is_cpu:
        plan["chunk_tokens"] = config.chunk_tokens
    if has_network:
        free = dataclasses.replace(config, use_tuned_plan=True)  # measured without, but to start where others are
        start = with_built_in_plan(free, trial.device, trial.topology, read_env())
        plan |= {"chunk_bytes": start.chunk_bytes, "ring_bytes": start.ring_bytes}
    if has_network and not is_cpu:
        launch = plan_launch(config, trial.topology)
        plan |= {"out_blocks": launch.out_blocks, "in_blocks": launch.in_blocks}
    env = read_env()
    return {name: value for name, value in plan.items() if getattr(env, name) is None}


def search(start: Plan, seconds: Callable[[Plan], float]) -> Plan:
    """The plan at which no neighbour is faster by more than `MARGIN`, or the best after `MAX_TRIALS`."""
    known: dict[tuple[tuple[str, int], ...], float] = {}

    def measured(plan: Plan) -> float:
        key = tuple(plan.items())
        if key not in known:
            known[key] = seconds(plan)
        return known[key]

    here = start
    measured(here)
    while len(known) < MAX_TRIALS:
        best = min(_neighbours(here), key=measured)
        if not measured(best) < (1 - MARGIN) * measured(here):
            break
        here = best
    return here


def _neighbours(plan: Plan) -> list[Plan]:
    found = []
    for name, value in plan.items():
        found += [{**plan, name: other} for other in (2 * value, value // 2) if other >= 1]
    if "chunk_bytes" in plan and "ring_bytes" in plan:  # both together: as many chunks, each larger
        found.append({**plan, "chunk_bytes": 2 * plan["chunk_bytes"], "ring_bytes": 2 * plan["ring_bytes"]})
    return found


def _text(plan: Plan) -> str:
    return "  ".join(f"{name} {value:>8}" for name, value in plan.items())


def printer(rank: int) -> Callable[[str], None]:
    """Prints on rank 0."""

    def show(line: Any) -> None:
        if rank == 0:
            print(line, flush=True)

    return show
