"""commlib: distributed MoE dispatch and combine.

Importing it loads neither torch nor the native core: names that need them are resolved at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from commlib.config import RuntimeConfig
from commlib.env import Env, read_env
from commlib.errors import (
    CapacityError,
    CommError,
    CommTimeout,
    ConfigError,
    PeerLostError,
    TransportError,
)
from commlib.layout import Layout
from commlib.topology import Topology, node_key

if TYPE_CHECKING:
    from commlib import routing
    from commlib.routing import GateConfig, GateOutput, gate

__version__ = "0.1.0"

# Name -> module that holds it; a module's own name stands for the module.
_LAZY = {
    "GateConfig": "commlib.routing",
    "GateOutput": "commlib.routing",
    "Handle": "commlib.handle",
    "Runtime": "commlib.runtime",
    "gate": "commlib.routing",
    "ops": "commlib.ops",
    "overlap": "commlib.overlap",
    "routing": "commlib.routing",
}

__all__ = [
    "CapacityError",
    "CommError",
    "CommTimeout",
    "ConfigError",
    "Env",
    "GateConfig",
    "GateOutput",
    "Handle",
    "Layout",
    "PeerLostError",
    "Runtime",
    "RuntimeConfig",
    "Topology",
    "TransportError",
    "__version__",
    "gate",
    "node_key",
    "ops",
    "overlap",
    "read_env",
    "routing",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'commlib' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if _LAZY[name] == f"commlib.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
