"""Steps of a construction that may fail on some ranks only: all ranks hear of it and raise the same error."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from commlib.bootstrap.interface import Bootstrap
from commlib.errors import CapacityError, CommError, CommTimeout, ConfigError, PeerLostError, TransportError

__all__ = ["allgather_or_raise", "largest_of", "require_equal"]

_TYPES = {
    kind.__name__: kind for kind in (CapacityError, CommError, CommTimeout, ConfigError, PeerLostError, TransportError)
}


def allgather_or_raise(boot: Bootstrap, step: Callable[[], bytes], *, timeout_s: float) -> list[bytes]:
    """Runs `step` on every rank and gives every rank's result to every rank.

    Raises:
        CommError: `step` raised on some rank: on all ranks the error of the lowest of them, its type and values too.
        CommTimeout: a rank did not arrive; names it.
    """
    own: Exception | None = None
    try:
        blob = b"+" + step()
    except Exception as error:
        own, blob = error, b"-" + _encode(error)
    blobs = boot.allgather(blob, timeout_s=timeout_s)
    for rank, each in enumerate(blobs):
        if each[:1] != b"+":
            raise _decode(rank, each[1:]) from own
    return [each[1:] for each in blobs]


def largest_of(boot: Bootstrap, value: float, *, timeout_s: float) -> float:
    """The largest of all ranks' numbers, on every rank."""
    return float(max(json.loads(blob) for blob in boot.allgather(json.dumps(value).encode(), timeout_s=timeout_s)))


def require_equal(values: Sequence[dict[str, Any]]) -> None:
    """Raises ConfigError, the same on all ranks, unless all ranks (`values` in rank order) have equal values."""
    differences = [
        f"rank {rank} has {name}={value}, rank 0 has {name}={values[0].get(name)}"
        for rank, own in enumerate(values)
        for name, value in own.items()
        if value != values[0].get(name)
    ]
    if differences:
        raise ConfigError(f"ranks must agree, but {'; '.join(differences)}")


def _encode(error: Exception) -> bytes:
    values = dict(error.__dict__) if isinstance(error, CommError) else {}
    if isinstance(error, CommError | ValueError):  # the native core says ValueError to a value that it does not know
        name, text = (type(error) if isinstance(error, CommError) else ConfigError).__name__, str(error)
    else:
        name, text = CommError.__name__, f"{type(error).__name__}: {error}"
    return json.dumps({"type": name, "text": text, "values": values}).encode()


def _decode(rank: int, blob: bytes) -> CommError:
    told = json.loads(blob)
    error: CommError = _TYPES.get(told["type"], CommError)(f"rank {rank}: {told['text']}", **told["values"])
    return error
