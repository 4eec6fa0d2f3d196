"""Plans that `commlib bench --tune` has found, by shape and topology, and the file that keeps them.

Which plan is in use changes no result, only how fast it comes.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from commlib.cache import write_whole
from commlib.config import RuntimeConfig
from commlib.env import Env, cache_folder
from commlib.errors import ConfigError
from commlib.topology import Topology

__all__ = [
    "TUNED_FIELDS",
    "Plan",
    "Plans",
    "apply_plan",
    "default_file",
    "read_plans",
    "shape_key",
    "store_plan",
    "topology_key",
    "with_built_in_plan",
]

_logger = logging.getLogger("commlib")
_VERSION = 2

# Fields of RuntimeConfig that a plan may set.
TUNED_FIELDS = ("chunk_tokens", "chunk_bytes", "ring_bytes", "out_blocks", "in_blocks")
# Without a plan from a file: between nodes GPUs run ahead of a proxy by more than the default ring holds.
_BETWEEN_GPUS = {"chunk_bytes": 256 << 10, "ring_bytes": 4 << 20}
# What a plan was measured with, and is good for.
_SHAPE_FIELDS = (
    "hidden",
    "num_experts",
    "num_topk",
    "max_tokens",
    "num_threads",
    "num_proxy_threads",
    "num_sms",
    "num_local_sms",
)

Plan = dict[str, int]


def shape_key(config: RuntimeConfig, device: str) -> dict[str, Any]:
    """What of a Runtime a plan depends on, but for its topology; `device` is "cpu" or the name of the GPU.

    Not the dtype: a Runtime carries rows of several.
    """
    return {"device": device, **{name: getattr(config, name) for name in _SHAPE_FIELDS}}


def topology_key(topology: Topology, transport: str) -> dict[str, Any]:
    """The rest: how many ranks share a node, and what carries bytes between nodes (not "auto")."""
    sizes = [len(topology.ranks_of_node(node)) for node in range(topology.num_nodes)]
    return {"node_sizes": sizes, "transport": transport if topology.num_nodes > 1 else None}


class Entry(NamedTuple):
    """A plan and what it is for."""

    shape: dict[str, Any]
    topology: dict[str, Any]
    plan: Plan


@dataclass(frozen=True)
class Plans:
    """What a file holds, in the form that travels between ranks."""

    entries: tuple[Entry, ...] = ()

    def of_shape(self, shape: dict[str, Any]) -> Plans:
        """Those for one shape: see `shape_key`."""
        return Plans(tuple(each for each in self.entries if each.shape == shape))

    def of_topology(self, topology: dict[str, Any]) -> Plan | None:
        """Of plans for one shape that for one topology: see `topology_key`."""
        return next((each.plan for each in self.entries if each.topology == topology), None)

    def to_bytes(self) -> bytes:
        return json.dumps({"version": _VERSION, "plans": [each._asdict() for each in self.entries]}, indent=1).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Plans:
        """Raises ValueError, KeyError or TypeError if this is nothing that `to_bytes` has made."""
        told = json.loads(content)
        if told["version"] != _VERSION:
            raise ValueError(f"version {told['version']}, not {_VERSION}")
        entries = []
        for each in told["plans"]:
            entry = Entry(dict(each["shape"]), dict(each["topology"]), dict(each["plan"]))
            unknown = set(entry.plan) - set(TUNED_FIELDS)
            if unknown or not all(type(value) is int and value >= 1 for value in entry.plan.values()):
                raise ValueError(f"a plan of {entry.plan}")
            entries.append(entry)
        return cls(tuple(entries))


def default_file() -> Path:
    """Where plans are kept unless COMMLIB_PLANS says otherwise."""
    return cache_folder() / "plans.json"


def read_plans(path: Path) -> Plans:
    """What a file holds; nothing, and a line in the log, if it cannot be read."""
    try:
        return Plans.from_bytes(path.read_bytes())
    except FileNotFoundError:
        return Plans()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        _logger.warning("%s is ignored: %s: %s", path, type(error).__name__, error)
        return Plans()


def store_plan(path: Path, shape: dict[str, Any], topology: dict[str, Any], plan: Plan) -> None:
    """Adds a plan, in place of an older one for the same shape and topology. Others see the old file or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    entry = Entry(shape, topology, plan)
    kept = [each for each in read_plans(path).entries if each[:2] != entry[:2]]
    write_whole(path, Plans((*kept, entry)).to_bytes())


def with_built_in_plan(config: RuntimeConfig, device: str, topology: Topology, env: Env) -> RuntimeConfig:
    """Between nodes GPUs get other chunks and rings than CPUs, unless somebody has set either.

    Args:
        config: with what a plan from a file says.
        device: as for `shape_key`, or "cuda".
    """
    is_free = all(getattr(config, name) == _default(name) and getattr(env, name) is None for name in _BETWEEN_GPUS)
    if device == "cpu" or topology.num_nodes == 1 or not is_free or not config.use_tuned_plan:
        return config
    return dataclasses.replace(config, **_BETWEEN_GPUS)  # type: ignore[arg-type]


def _default(name: str) -> Any:
    return getattr(RuntimeConfig, name)


def apply_plan(config: RuntimeConfig, plan: Plan, env: Env) -> RuntimeConfig:
    """`config` with the plan's values in those fields that have their defaults and are not set in the environment.

    A plan that does not go with the rest of the config changes nothing, and says so in the log.
    """
    changes: Any = {
        name: value
        for name, value in plan.items()
        if getattr(config, name) == _default(name) and getattr(env, name) is None
    }
    try:
        return dataclasses.replace(config, **changes)
    except ConfigError as error:
        _logger.warning("the tuned plan %s is ignored: %s", plan, error)
        return config
