"""The file of tuned plans, which plan a Runtime takes from it, and the search for one."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from commlib.cli.tune import MARGIN, default_plan, search, tune
from commlib.config import RuntimeConfig
from commlib.env import Env
from commlib.errors import CapacityError
from commlib.runtime import Runtime
from commlib.topology import Topology
from commlib.tuned_plans import (
    Plans,
    apply_plan,
    read_plans,
    shape_key,
    store_plan,
    topology_key,
    with_built_in_plan,
)

CONFIG = RuntimeConfig(hidden=256, num_experts=8, num_topk=2)
TWO_NODES, FOUR_NODES = topology_key(Topology.uniform(4, 2), "ucx"), topology_key(Topology.uniform(4, 1), "ucx")
PLAN = {"chunk_bytes": 32768, "ring_bytes": 262144}


def test_plans_are_kept_by_shape_and_topology(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "plans.json"
    shape = shape_key(CONFIG, "cpu")
    store_plan(path, shape, TWO_NODES, {"ring_bytes": 1})
    store_plan(path, shape, FOUR_NODES, {"ring_bytes": 2})
    store_plan(path, shape_key(CONFIG, "NVIDIA H200"), TWO_NODES, {"ring_bytes": 3})
    store_plan(path, shape, TWO_NODES, PLAN)  # in place of the first
    plans = read_plans(path)
    assert len(plans.entries) == 3
    assert plans.of_shape(shape).of_topology(TWO_NODES) == PLAN
    assert plans.of_shape(shape).of_topology(FOUR_NODES) == {"ring_bytes": 2}
    assert plans.of_shape(shape).of_topology(topology_key(Topology.uniform(8, 2), "ucx")) is None
    assert plans.of_shape(shape).of_topology(topology_key(Topology.uniform(4, 2), "verbs")) is None
    assert plans.of_shape(shape_key(dataclasses.replace(CONFIG, max_tokens=1), "cpu")).entries == ()
    assert Plans.from_bytes(plans.to_bytes()) == plans
    assert list(path.parent.iterdir()) == [path]  # nothing half written stays


def test_what_carries_bytes_between_nodes_matters_between_nodes_only() -> None:
    one_node = Topology.uniform(4, 4)
    assert topology_key(one_node, "ucx") == topology_key(one_node, "verbs")
    assert topology_key(Topology.uniform(4, 2), "ucx") != topology_key(Topology.uniform(4, 2), "verbs")
    assert topology_key(Topology((0, 1, 1)), "ucx") != topology_key(Topology((0, 0, 1)), "ucx")


ENTRY: dict[str, Any] = {"shape": {}, "topology": {}, "plan": {"ring_bytes": 1}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"version": 1, "plans": []}',
        '{"version": 2}',
        json.dumps({"version": 2, "plans": [{**ENTRY, "plan": {"num_sms": 8}}]}),
        json.dumps({"version": 2, "plans": [{**ENTRY, "plan": {"ring_bytes": "8"}}]}),
        json.dumps({"version": 2, "plans": [{**ENTRY, "plan": {"ring_bytes": 0}}]}),
        json.dumps({"version": 2, "plans": [{"plan": {}}]}),
    ],
)
def test_a_file_of_something_else_is_ignored(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "plans.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING, logger="commlib"):
        assert read_plans(path) == Plans()
    assert [record for record in caplog.records if f"{path} is ignored" in record.getMessage()]
    # The same as a file, but right.
    path.write_text(json.dumps({"version": 2, "plans": [ENTRY]}))
    assert len(read_plans(path).entries) == 1


def test_nothing_half_written_stays_if_storing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plans.json"
    store_plan(path, shape_key(CONFIG, "cpu"), TWO_NODES, PLAN)
    before = path.read_bytes()

    def refuse(source: str, target: Path) -> None:
        raise OSError("no room")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no room"):
        store_plan(path, shape_key(CONFIG, "cpu"), FOUR_NODES, PLAN)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_what_the_caller_or_the_environment_has_set_stands(caplog: pytest.LogCaptureFixture) -> None:
    assert apply_plan(CONFIG, PLAN, Env()) == dataclasses.replace(CONFIG, **PLAN)
    mine = dataclasses.replace(CONFIG, chunk_bytes=16384)
    assert apply_plan(mine, PLAN, Env()) == dataclasses.replace(mine, ring_bytes=262144)
    # In the environment even a default counts as a choice.
    env = Env(chunk_bytes=CONFIG.chunk_bytes)
    assert apply_plan(CONFIG.with_env(env), PLAN, env) == dataclasses.replace(CONFIG, ring_bytes=262144)
    assert apply_plan(CONFIG, {"out_blocks": 3, "in_blocks": 4}, Env()).out_blocks == 3
    with caplog.at_level(logging.WARNING, logger="commlib"):
        assert apply_plan(CONFIG, {"ring_bytes": 1024}, Env()) == CONFIG  # less than two rows
    assert "is ignored: ring_bytes=1024 is below" in caplog.text


def test_between_nodes_gpus_have_other_rings_unless_somebody_has_set_them(caplog: pytest.LogCaptureFixture) -> None:
    two, one = Topology.uniform(4, 2), Topology.uniform(4, 4)
    for device, topology in (("cpu", two), ("cuda", one)):
        assert with_built_in_plan(CONFIG, device, topology, Env()) == CONFIG
    for device in ("cuda", "NVIDIA H200"):
        made = with_built_in_plan(CONFIG, device, two, Env())
        assert (made.chunk_bytes, made.ring_bytes) == (256 << 10, 4 << 20)
    changes: list[dict[str, Any]] = [{"ring_bytes": 256 << 10}, {"chunk_bytes": 1 << 19}, {"use_tuned_plan": False}]
    for change in changes:
        config = dataclasses.replace(CONFIG, **change)
        assert with_built_in_plan(config, "cuda", two, Env()) == config
    assert with_built_in_plan(CONFIG, "cuda", two, Env(chunk_bytes=1 << 16)) == CONFIG
    assert not caplog.records


def test_a_runtime_takes_the_plan_of_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plans.json"
    alone = topology_key(Topology.uniform(1, 1), "ucx")
    store_plan(path, shape_key(CONFIG, "cpu"), alone, {"chunk_tokens": 8})
    monkeypatch.setenv("COMMLIB_PLANS", str(path))
    with Runtime(None, CONFIG) as runtime:
        assert runtime.config.chunk_tokens == 8
        assert """tuned plan, from rank 0's file: {"chunk_tokens": 8}""" in runtime.describe()
    for config in (dataclasses.replace(CONFIG, use_tuned_plan=False), dataclasses.replace(CONFIG, num_topk=3)):
        with Runtime(None, config) as runtime:
            assert runtime.config == config and "tuned" not in runtime.describe()
    with monkeypatch.context() as environment:
        environment.setenv("COMMLIB_CHUNK_TOKENS", str(CONFIG.chunk_tokens))
        with Runtime(None, CONFIG) as runtime:
            assert runtime.config == CONFIG and "tuned plan" not in runtime.describe()
    monkeypatch.setenv("COMMLIB_PLANS", "off")
    with Runtime(None, CONFIG) as runtime:
        assert runtime.config == CONFIG


def test_search_walks_to_the_fastest() -> None:
    asked: list[dict[str, int]] = []

    def seconds(plan: dict[str, int]) -> float:
        asked.append(plan)
        far = abs(plan["chunk_bytes"].bit_length() - 15) + abs(plan["ring_bytes"].bit_length() - 20)
        return 1.0 + far

    start = {"chunk_bytes": 1 << 16, "ring_bytes": 1 << 17}
    assert search(start, seconds) == {"chunk_bytes": 1 << 14, "ring_bytes": 1 << 19}
    assert len(asked) == len({tuple(plan.items()) for plan in asked}), "a plan was measured twice"
    assert search(start, lambda plan: 1.0 - 0.9 * MARGIN * (plan != start)) == start


class FakeTrial:
    """Smaller chunks are faster by `gain`, but for the call of that number; larger rings do not fit."""

    rank, device, topology, config = 0, "cpu", Topology.uniform(4, 2), CONFIG

    def __init__(self, gain: float, bad_call: int | None = None) -> None:
        self.gain, self.bad_call, self.num_calls = gain, bad_call, 0

    def seconds(self, config: RuntimeConfig) -> float:
        if config.ring_bytes > CONFIG.ring_bytes:
            raise CapacityError("no room", needed=2, available=1)
        if config.chunk_bytes != 32768:
            return 1.0
        self.num_calls += 1
        return 1.1 if self.num_calls == self.bad_call else 1.0 - self.gain


# The search calls four times with chunks of that size, so the seventh call is the third comparison.
@pytest.mark.parametrize(
    ("gain", "bad_call", "chunk_bytes"), [(0.5, None, 32768), (0.01, None, 65536), (0.5, 7, 65536)]
)
def test_tuning_stores_what_is_faster_each_time_and_beyond_noise(
    gain: float, bad_call: int | None, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "plans.json"
    monkeypatch.setenv("COMMLIB_PLANS", str(path))
    lines: list[str] = []
    trial = FakeTrial(gain, bad_call)
    best = tune(trial, lines.append)
    assert best == {**default_plan(trial), "chunk_bytes": chunk_bytes}
    assert read_plans(path).of_shape(shape_key(CONFIG, "cpu")).of_topology(TWO_NODES) == best
    assert str(path) in lines[-1]
    assert any(f"ring_bytes  {2 * CONFIG.ring_bytes}  does not fit: no room" in line for line in lines), lines


def test_what_may_be_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = FakeTrial(0.0)
    assert set(default_plan(trial)) == {"chunk_tokens", "chunk_bytes", "ring_bytes"}
    trial.topology = Topology.uniform(4, 4)
    assert set(default_plan(trial)) == {"chunk_tokens"}
    trial.device = "NVIDIA H200"
    assert default_plan(trial) == {}
    trial.topology = Topology.uniform(4, 2)
    assert set(default_plan(trial)) == {"chunk_bytes", "ring_bytes", "out_blocks", "in_blocks"}
    monkeypatch.setenv("COMMLIB_RING_BYTES", "524288")
    monkeypatch.setenv("COMMLIB_IN_BLOCKS", "2")
    assert set(default_plan(trial)) == {"chunk_bytes", "out_blocks"}
    asked = []
    search(default_plan(trial), lambda plan: asked.append(plan) or 1.0)  # type: ignore[func-returns-value]
    assert all(plan.keys() == {"chunk_bytes", "out_blocks"} for plan in asked)
