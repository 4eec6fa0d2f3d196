"""What the environment says about the network, in the words of the native transports."""

from __future__ import annotations

from typing import Any

from commlib import _native
from commlib.bootstrap import Bootstrap
from commlib.bootstrap.agreement import allgather_or_raise
from commlib.env import Env, read_env

__all__ = ["agree_on_transport", "transport_options"]

# Fields of the native TransportOptions that have the name and the value of the Env's.
_COPIED = (
    "max_nics",
    "gid_index",
    "mtu",
    "ack_timeout",
    "retry_count",
    "rnr_retry_count",
    "traffic_class",
    "service_level",
    "send_operations",
    "send_bytes",
)


def transport_options(env: Env) -> Any:
    """The native TransportOptions: defaults, and what `env` sets over them."""
    options = _native.TransportOptions()
    for name in _COPIED:
        value = getattr(env, name)
        if value is not None:
            setattr(options, name, value)
    if env.nics is not None:
        options.nics = list(env.nics)
    if env.signal is not None:
        options.signal_by_immediate = env.signal == "immediate"
    return options


def agree_on_transport(boot: Bootstrap, local_rank: int, timeout_s: float) -> str:
    """What "auto" means: verbs where every rank can use it, else ucx; ranks of different nodes must not differ.
    Collective.
    """

    def tell() -> bytes:
        options = transport_options(read_env())
        options.local_rank = local_rank
        return b"1" if _native.has_verbs(options) else b"0"

    told = allgather_or_raise(boot, tell, timeout_s=timeout_s)
    return "verbs" if all(each == b"1" for each in told) else "ucx"
