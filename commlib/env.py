"""The environment variables of commlib: the only module that reads them.

==============================  ============================================================================
variable                        meaning
==============================  ============================================================================
COMMLIB_RANKS_PER_NODE          ranks that count as one node, to simulate several nodes on one machine
COMMLIB_TIMEOUT                 seconds without progress after which a wait raises
COMMLIB_HEARTBEAT_TIMEOUT       seconds without a heartbeat after which a peer counts as lost
COMMLIB_LOG                     debug | info | warning | error, on stderr unless the program sets up logging
COMMLIB_RENDEZVOUS              tcp://host:port at which ranks meet
COMMLIB_JOB_TOKEN               secret that the ranks of one job share
COMMLIB_RANK                    this process's rank
COMMLIB_WORLD_SIZE              number of ranks
COMMLIB_TRANSPORT               name of the scale-out transport: ucx | verbs | auto
COMMLIB_RING_MEMORY             where the rings between nodes lie, for GPUs: host | device
COMMLIB_NUM_THREADS             worker threads of the CPU executor, per rank
COMMLIB_NUM_PROXY_THREADS       threads that carry bytes between nodes, per rank
COMMLIB_BOOTSTRAP               auto | mpi | zmq | torch
COMMLIB_PLANS                   file of tuned plans, read by rank 0 (plans.json in `cache_folder`); off: none

what a tuned plan would set, and RuntimeConfig explains; equal on all ranks:
COMMLIB_CHUNK_TOKENS            tokens moved per signal inside a node
COMMLIB_CHUNK_BYTES             bytes of a put between nodes
COMMLIB_RING_BYTES              bytes of a ring between nodes
COMMLIB_OUT_BLOCKS              multiprocessors of a GPU that send to other nodes
COMMLIB_IN_BLOCKS               multiprocessors of a GPU that take in what comes from other nodes

only the verbs transport reads:
COMMLIB_NICS                    ports to use, "mlx5_0,mlx5_1:2"; unset: the nearest
COMMLIB_MAX_NICS                how many of the nearest ports share the peers
COMMLIB_GID_INDEX               index of the ports' address; unset: RoCE v2, IPv4 if there is one
COMMLIB_MTU                     bytes of a packet at most: 256 | 512 | 1024 | 2048 | 4096
COMMLIB_ACK_TIMEOUT             a packet is repeated after 4.096 us * 2^this; 1..31
COMMLIB_RETRY_COUNT             repetitions before a peer counts as lost; 0..7
COMMLIB_RNR_RETRY_COUNT         likewise while a peer has no receive posted; 0..6, 7 = for ever
COMMLIB_TRAFFIC_CLASS           of the packets; 0..255
COMMLIB_SERVICE_LEVEL           of the packets; 0..15
COMMLIB_SIGNAL                  write | immediate: how a peer learns that data is there
COMMLIB_SEND_OPERATIONS         work requests in flight to one peer, at most
COMMLIB_SEND_BYTES              bytes in flight to one peer, at most
==============================  ============================================================================
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commlib.errors import ConfigError

__all__ = [
    "BOOTSTRAPS",
    "LOG_LEVELS",
    "RING_MEMORIES",
    "SIGNALS",
    "Env",
    "cache_folder",
    "launcher_environment",
    "read_env",
]

PREFIX = "COMMLIB_"
LOG_LEVELS = ("debug", "info", "warning", "error")
BOOTSTRAPS = ("auto", "mpi", "zmq", "torch")
SIGNALS = ("write", "immediate")
RING_MEMORIES = ("host", "device")

_RENDEZVOUS = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


@dataclass(frozen=True, kw_only=True)
class Env:
    """What the environment asks for; None where it says nothing. Times in seconds."""

    ranks_per_node: int | None = None
    timeout_s: float | None = None
    heartbeat_timeout_s: float | None = None
    log: str | None = None
    rendezvous: str | None = None
    # A secret: whoever knows it can join the job, so it stays out of logs.
    job_token: str | None = field(default=None, repr=False)
    rank: int | None = None
    world_size: int | None = None
    transport: str | None = None
    ring_memory: str | None = None
    num_threads: int | None = None
    num_proxy_threads: int | None = None
    bootstrap: str = "auto"
    plans: str | None = None
    chunk_tokens: int | None = None
    chunk_bytes: int | None = None
    ring_bytes: int | None = None
    out_blocks: int | None = None
    in_blocks: int | None = None
    nics: tuple[str, ...] | None = None
    max_nics: int | None = None
    gid_index: int | None = None
    mtu: int | None = None
    ack_timeout: int | None = None
    retry_count: int | None = None
    rnr_retry_count: int | None = None
    traffic_class: int | None = None
    service_level: int | None = None
    signal: str | None = None
    send_operations: int | None = None
    send_bytes: int | None = None


def _integer(minimum: int, maximum: int = 2**31 - 1) -> Callable[[str, str], int]:
    rule = f"an integer in {minimum}..{maximum}"

    def parse(name: str, text: str) -> int:
        # int() would also take "1_0" and " 1 ", which is more likely a slip than an intention.
        is_integer = re.fullmatch(r"\d{1,18}", text, re.ASCII) is not None
        if not is_integer or not minimum <= int(text) <= maximum:
            raise ConfigError(f"{name}={text!r} is not {rule}")
        return int(text)

    return parse


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}={text!r} is not a finite number of seconds > 0")
    return value


def _choice(choices: tuple[str, ...]) -> Callable[[str, str], str]:
    def parse(name: str, text: str) -> str:
        if text not in choices:
            raise ConfigError(f"{name}={text!r} is not one of {'|'.join(choices)}")
        return text

    return parse


def _rendezvous(name: str, text: str) -> str:
    match = _RENDEZVOUS.fullmatch(text)
    if match is None or not 1 <= int(match["port"]) <= 65535:
        raise ConfigError(f"{name}={text!r} is not tcp://host:port with port in 1..65535")
    return text


def _word(name: str, text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9_.:,-]+", text) is None:
        raise ConfigError(f"{name}={text!r} is not a name of letters, digits and _.:,-")
    return text


def _ports(name: str, text: str) -> tuple[str, ...]:
    ports = tuple(text.split(","))
    if any(re.fullmatch(r"[A-Za-z0-9_.-]+(:[1-9]\d?)?", port, re.ASCII) is None for port in ports):
        raise ConfigError(f"{name}={text!r} is not a list of device or device:port, separated by commas")
    return ports


def _mtu(name: str, text: str) -> int:
    return int(_choice(("256", "512", "1024", "2048", "4096"))(name, text))


def _text(name: str, text: str) -> str:
    if not text.strip():
        raise ConfigError(f"{name} is set but blank; the rule: a non-blank text")
    return text


_PARSERS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "COMMLIB_RANKS_PER_NODE": ("ranks_per_node", _integer(1)),
    "COMMLIB_TIMEOUT": ("timeout_s", _seconds),
    "COMMLIB_HEARTBEAT_TIMEOUT": ("heartbeat_timeout_s", _seconds),
    "COMMLIB_LOG": ("log", _choice(LOG_LEVELS)),
    "COMMLIB_RENDEZVOUS": ("rendezvous", _rendezvous),
    "COMMLIB_JOB_TOKEN": ("job_token", _text),
    "COMMLIB_RANK": ("rank", _integer(0)),
    "COMMLIB_WORLD_SIZE": ("world_size", _integer(1)),
    "COMMLIB_TRANSPORT": ("transport", _word),
    "COMMLIB_RING_MEMORY": ("ring_memory", _choice(RING_MEMORIES)),
    "COMMLIB_NUM_THREADS": ("num_threads", _integer(1)),
    "COMMLIB_NUM_PROXY_THREADS": ("num_proxy_threads", _integer(1, 8)),
    "COMMLIB_BOOTSTRAP": ("bootstrap", _choice(BOOTSTRAPS)),
    "COMMLIB_PLANS": ("plans", _text),
    "COMMLIB_CHUNK_TOKENS": ("chunk_tokens", _integer(1)),
    "COMMLIB_CHUNK_BYTES": ("chunk_bytes", _integer(1, 2**48)),
    "COMMLIB_RING_BYTES": ("ring_bytes", _integer(1, 2**48)),
    "COMMLIB_OUT_BLOCKS": ("out_blocks", _integer(1)),
    "COMMLIB_IN_BLOCKS": ("in_blocks", _integer(1)),
    "COMMLIB_NICS": ("nics", _ports),
    "COMMLIB_MAX_NICS": ("max_nics", _integer(1)),
    "COMMLIB_GID_INDEX": ("gid_index", _integer(0, 255)),
    "COMMLIB_MTU": ("mtu", _mtu),
    "COMMLIB_ACK_TIMEOUT": ("ack_timeout", _integer(1, 31)),
    "COMMLIB_RETRY_COUNT": ("retry_count", _integer(0, 7)),
    "COMMLIB_RNR_RETRY_COUNT": ("rnr_retry_count", _integer(0, 7)),
    "COMMLIB_TRAFFIC_CLASS": ("traffic_class", _integer(0, 255)),
    "COMMLIB_SERVICE_LEVEL": ("service_level", _integer(0, 15)),
    "COMMLIB_SIGNAL": ("signal", _choice(SIGNALS)),
    "COMMLIB_SEND_OPERATIONS": ("send_operations", _integer(1, 16384)),
    "COMMLIB_SEND_BYTES": ("send_bytes", _integer(1, 2**48)),
}


def read_env(environ: Mapping[str, str] = os.environ) -> Env:
    """Reads and checks all ``COMMLIB_*`` variables.

    Raises:
        ConfigError: a variable is unknown (the message suggests a close match) or its value breaks its rule.
    """
    values: dict[str, Any] = {}
    for name in sorted(key for key in environ if key.startswith(PREFIX)):
        if name not in _PARSERS:
            # Without the prefix, which would make any two names similar.
            nouns = [known.removeprefix(PREFIX) for known in _PARSERS]
            close = difflib.get_close_matches(name.removeprefix(PREFIX), nouns, n=1, cutoff=0.6)
            hint = f"; did you mean {PREFIX}{close[0]}?" if close else f"; known: {', '.join(_PARSERS)}"
            raise ConfigError(f"unknown environment variable {name}{hint}")
        attribute, parse = _PARSERS[name]
        values[attribute] = parse(name, environ[name])
    env = Env(**values)
    if env.rank is not None and env.world_size is not None and env.rank >= env.world_size:
        raise ConfigError(f"COMMLIB_RANK={env.rank} is not below COMMLIB_WORLD_SIZE={env.world_size}")
    return env


def launcher_environment() -> Mapping[str, str]:
    """What mpirun, torchrun and others tell the processes that they start (PMI_RANK, RANK, MASTER_ADDR, ...)."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where compiled kernels and tuned plans are kept: commlib in $XDG_CACHE_HOME, which is ~/.cache where it is unset
    or, as its specification has it, not absolute.
    """
    told = environ.get("XDG_CACHE_HOME", "")
    return (Path(told) if os.path.isabs(told) else Path(os.path.expanduser("~/.cache"))) / "commlib"
