import dataclasses
import subprocess
import sys
from typing import Any

import pytest

from commlib.config import RuntimeConfig
from commlib.env import Env
from commlib.errors import ConfigError


def config(**changes: Any) -> RuntimeConfig:
    return RuntimeConfig(**{"hidden": 7168, "num_experts": 256, "num_topk": 8, **changes})


def test_defaults() -> None:
    made = config()
    assert (made.max_tokens, made.expert_alignment, made.num_threads) == (4096, 128, 1)
    assert (made.chunk_tokens, made.chunk_bytes, made.ring_bytes) == (32, 65536, 1048576)
    assert (made.arena_bytes, made.max_arena_bytes, made.max_in_flight) == (None, 64 * 2**30, 8)
    assert (made.timeout_s, made.heartbeat_timeout_s, made.transport) == (300.0, 10.0, "ucx")


def test_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().hidden = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        RuntimeConfig(7168, 256, 8)  # type: ignore[misc]


INTEGERS = [
    field.name
    for field in dataclasses.fields(RuntimeConfig)
    if field.name not in ("timeout_s", "heartbeat_timeout_s", "transport", "ring_memory", "use_tuned_plan")
]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_integers_must_be_positive(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value!r} is not an integer >= 1"):
        config(**{name: value})


@pytest.mark.parametrize("name", ["timeout_s", "heartbeat_timeout_s"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "1", True])
def test_times_must_be_positive(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value!r} is not a finite number"):
        config(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_topk": 9, "num_experts": 8}, r"num_topk=9 is above min\(num_experts=8, 64\)=8"),
        ({"num_topk": 65}, r"num_topk=65 is above min\(num_experts=256, 64\)=64"),
        ({"ring_bytes": 131071}, "ring_bytes=131071 is below 2 \\* chunk_bytes=131072"),
        ({"hidden": 600_000}, "ring_bytes=1048576 is below 4802048"),
        ({"arena_bytes": 2, "max_arena_bytes": 1}, "arena_bytes=2 is above max_arena_bytes=1"),
        ({"max_tokens": 2**31}, "max_tokens=2147483648 does not fit 32 bits"),
        ({"num_threads": 2**31}, "num_threads=2147483648 does not fit 32 bits"),
        ({"max_in_flight": 2**31}, "max_in_flight=2147483648 does not fit 32 bits"),
        ({"num_sms": 16, "num_local_sms": 8}, "num_local_sms=8 is below num_sms=16"),
        ({"decode_tokens": 1025}, "decode_tokens=1025 is above 1024"),
        ({"decode_tokens": -1}, "decode_tokens=-1 is not an integer >= 1"),
        ({"ring_memory": "gpu"}, r"ring_memory='gpu' is not one of host\|device"),
        ({"ring_memory": None}, r"ring_memory=None is not one of host\|device"),
        ({"transport": ""}, "transport='' is not a non-empty name"),
        ({"transport": 3}, "transport=3 is not a non-empty name"),
    ],
)
def test_rules(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_limits_themselves_are_allowed() -> None:
    assert config(num_topk=64).num_topk == 64
    assert config(num_topk=8, num_experts=8).num_topk == 8
    assert config(ring_bytes=2 * 262144).ring_bytes == 524288
    assert config(arena_bytes=4, max_arena_bytes=4).arena_bytes == 4


def test_with_env_overrides_only_what_is_set() -> None:
    env = Env(timeout_s=2.5, heartbeat_timeout_s=1.0, num_threads=3, transport="loopback", rank=1, world_size=2)
    changed = config().with_env(env)
    assert changed == config(timeout_s=2.5, heartbeat_timeout_s=1.0, num_threads=3, transport="loopback")
    assert config().with_env(Env(ring_memory="device")) == config(ring_memory="device")
    assert config(num_threads=7).with_env(Env()) == config(num_threads=7)
    plan = {"chunk_tokens": 5, "chunk_bytes": 4096, "ring_bytes": 2**20, "out_blocks": 2, "in_blocks": 3}
    assert config().with_env(Env(**plan)) == config(**plan)
    with pytest.raises(ConfigError, match="ring_bytes=16384 is below 2"):
        config(chunk_bytes=8193).with_env(Env(ring_bytes=16384))


CHANGED: dict[str, Any] = {
    "hidden": 1024,
    "num_experts": 128,
    "num_topk": 4,
    "max_tokens": 128,
    "expert_alignment": 64,
    "chunk_tokens": 16,
    "chunk_bytes": 4096,
    "ring_bytes": 8388608,
    "max_arena_bytes": 2**30,
    "max_in_flight": 2,
    "heartbeat_timeout_s": 5.0,
    "transport": "loopback",
    "ring_memory": "device",
    "decode_tokens": 128,
    "num_sms": 8,
    "num_proxy_threads": 2,
    "num_local_sms": 64,
    "out_blocks": 2,
    "in_blocks": 3,
    "use_tuned_plan": False,
}
LOCAL: dict[str, Any] = {"num_threads": 2, "arena_bytes": 4096, "timeout_s": 1.0}


def test_every_field_is_either_shared_or_local() -> None:
    assert {field.name for field in dataclasses.fields(RuntimeConfig)} == CHANGED.keys() | LOCAL.keys()


def test_digest_follows_shared_fields_only() -> None:
    digests = {config(**{name: value}).digest() for name, value in CHANGED.items()} | {config().digest()}
    assert len(digests) == len(CHANGED) + 1
    assert {config(**{name: value}).digest() for name, value in LOCAL.items()} == {config().digest()}
    assert all(0 <= digest < 2**63 for digest in digests)


def test_digest_is_equal_in_another_process() -> None:
    program = (
        "from commlib.config import RuntimeConfig;"
        "print(RuntimeConfig(hidden=7168, num_experts=256, num_topk=8).digest())"
    )
    # Another hash seed: a digest built on hash() would differ.
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == config().digest()


def test_check_ranks() -> None:
    config().check_ranks(8)
    with pytest.raises(ConfigError, match="num_experts=257 is not divisible by num_ranks=8"):
        config(num_experts=257).check_ranks(8)
    with pytest.raises(ConfigError, match="num_ranks=0 is below 1"):
        config().check_ranks(0)
