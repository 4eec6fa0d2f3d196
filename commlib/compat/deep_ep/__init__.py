"""DeepEP's interfaces on commlib: `Buffer` (V1), `ElasticBuffer` (V2) and `HybridEPBuffer` (hybrid-ep).

`commlib.compat.install()` makes it importable as `deep_ep`. This package translates; the Runtime works. What is
covered, and what differs, is in docs/deep_ep.md.
"""

from typing import Any

from commlib.compat.deep_ep.buffer import Buffer
from commlib.compat.deep_ep.elastic import ElasticBuffer
from commlib.compat.deep_ep.ep_handle import EPHandle
from commlib.compat.deep_ep.hybrid_ep_buffer import HybridEPBuffer
from commlib.compat.deep_ep.runtimes import topology_of
from commlib.compat.deep_ep.settings import Config, topk_idx_t
from commlib.compat.deep_ep.utils.event import EventHandle, EventOverlap

# The release of DeepEP whose interface this is.
__version__ = "2.1.0+commlib"

__all__ = [
    "Buffer",
    "Config",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "HybridEPBuffer",
    "get_logical_domain_size",
    "get_physical_domain_size",
    "topk_idx_t",
]


def get_physical_domain_size(group: Any) -> tuple[int, int]:
    """(nodes, ranks per node) of a group, from its first dispatch on."""
    return topology_of(group)


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> tuple[int, int]:
    """(nodes, ranks per node) of a group, from its first dispatch on."""
    return topology_of(group)
