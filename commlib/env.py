"""The environment variables of commlib: the only module that reads them.

==============================  ============================================================================
variable                        meaning
==============================  ============================================================================
COMMLIB_RANKS_PER_NODE          ranks that count as one node, to simulate several nodes on one machine
COMMLIB_TIMEOUT                 seconds without progress after which a wait raises
COMMLIB_HEARTBEAT_TIMEOUT       seconds without a heartbeat after which a peer counts as lost
COMMLIB_LOG                     debug | info | warning | error
COMMLIB_RENDEZVOUS              tcp://host:port at which ranks meet
COMMLIB_JOB_TOKEN               secret that the ranks of one job share
COMMLIB_RANK                    this process's rank
COMMLIB_WORLD_SIZE              number of ranks
COMMLIB_TRANSPORT               name of the scale-out transport
COMMLIB_NUM_THREADS             worker threads of the CPU executor, per rank
COMMLIB_BOOTSTRAP               auto | mpi | zmq | torch
==============================  ============================================================================
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from commlib.errors import ConfigError

__all__ = ["BOOTSTRAPS", "LOG_LEVELS", "Env", "launcher_environment", "read_env"]

PREFIX = "COMMLIB_"
LOG_LEVELS = ("debug", "info", "warning", "error")
BOOTSTRAPS = ("auto", "mpi", "zmq", "torch")

_RENDEZVOUS = re.compile(r"tcp://(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


@dataclass(frozen=True, kw_only=True)
class Env:
    """What the environment asks for; None where it says nothing. Times in seconds."""

    ranks_per_node: int | None = None
    timeout_s: float | None = None
    heartbeat_timeout_s: float | None = None
    log: str = "warning"
    rendezvous: str | None = None
    # A secret: whoever knows it can join the job, so it stays out of logs.
    job_token: str | None = field(default=None, repr=False)
    rank: int | None = None
    world_size: int | None = None
    transport: str | None = None
    num_threads: int | None = None
    bootstrap: str = "auto"


def _integer(minimum: int) -> Callable[[str, str], int]:
    def parse(name: str, text: str) -> int:
        # int() would also take "1_0" and " 1 ", which is more likely a slip than an intention.
        if re.fullmatch(r"\d{1,18}", text, re.ASCII) is None or int(text) < minimum:
            raise ConfigError(f"{name}={text!r} is not an integer >= {minimum}")
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


def _secret(name: str, text: str) -> str:
    if not text.strip():
        raise ConfigError(f"{name} is set but blank; the rule: a non-blank text")
    return text


_PARSERS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "COMMLIB_RANKS_PER_NODE": ("ranks_per_node", _integer(1)),
    "COMMLIB_TIMEOUT": ("timeout_s", _seconds),
    "COMMLIB_HEARTBEAT_TIMEOUT": ("heartbeat_timeout_s", _seconds),
    "COMMLIB_LOG": ("log", _choice(LOG_LEVELS)),
    "COMMLIB_RENDEZVOUS": ("rendezvous", _rendezvous),
    "COMMLIB_JOB_TOKEN": ("job_token", _secret),
    "COMMLIB_RANK": ("rank", _integer(0)),
    "COMMLIB_WORLD_SIZE": ("world_size", _integer(1)),
    "COMMLIB_TRANSPORT": ("transport", _word),
    "COMMLIB_NUM_THREADS": ("num_threads", _integer(1)),
    "COMMLIB_BOOTSTRAP": ("bootstrap", _choice(BOOTSTRAPS)),
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
