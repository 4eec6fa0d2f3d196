"""The messages of the ZeroMQ rendezvous: fixed binary layouts, and the proof that a peer knows the job token.

A message is a header, the fields of its kind, and for three kinds more frames:

=========  ==================  ======================================  =====================
kind       way                 fields                                  more frames
=========  ==================  ======================================  =====================
HELLO      client to server    rank, size, client nonce
CHALLENGE  server to client    client nonce, server nonce
PROOF      client to server    HMAC of the client
WELCOME    server to client    HMAC of the server
REFUSED    server to client    reason
GATHER     client to server    round, seconds the client will wait     payload
RESULT     server to client    round                                   one payload per rank
MISSING    server to client    seconds waited                          ranks, u32 each
BYE        client to server
=========  ==================  ======================================  =====================

Integers are little endian. The token itself never travels. Nothing from the wire is ever evaluated or unpickled.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

__all__ = [
    "MAX_RANKS",
    "NONCE_BYTES",
    "Kind",
    "Message",
    "Refusal",
    "WireError",
    "pack",
    "pack_ranks",
    "proof",
    "unpack",
    "unpack_ranks",
]

NONCE_BYTES = 16
MAX_RANKS = 1 << 20

_MAGIC = b"CMLB"
_VERSION = 1
_HEADER = struct.Struct("<4sBBI")  # magic, version, kind, instance
_RANK = struct.Struct("<I")


class Kind(IntEnum):
    """What a message is."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSED = 5
    GATHER = 6
    RESULT = 7
    MISSING = 8
    BYE = 9


class Refusal(IntEnum):
    """Why the server turned a peer away."""

    BAD_MESSAGE = 1
    BAD_TOKEN = 2
    WRONG_SIZE = 3
    BAD_RANK = 4
    DUPLICATE_RANK = 5
    OUT_OF_STEP = 6


_FIELDS = {
    Kind.HELLO: struct.Struct(f"<II{NONCE_BYTES}s"),
    Kind.CHALLENGE: struct.Struct(f"<{NONCE_BYTES}s{NONCE_BYTES}s"),
    Kind.PROOF: struct.Struct("<32s"),
    Kind.WELCOME: struct.Struct("<32s"),
    Kind.REFUSED: struct.Struct("<I"),
    Kind.GATHER: struct.Struct("<Qd"),
    Kind.RESULT: struct.Struct("<Q"),
    Kind.MISSING: struct.Struct("<d"),
    Kind.BYE: struct.Struct("<"),
}


class WireError(Exception):
    """Bytes that are no message of this protocol."""


class Message(NamedTuple):
    """A message whose layout has been checked; the meaning of its values has not."""

    kind: Kind
    instance: int
    fields: tuple[Any, ...]
    frames: Sequence[bytes]


def pack(kind: Kind, instance: int, *fields: int | float | bytes) -> bytes:
    """The first frame of a message."""
    return _HEADER.pack(_MAGIC, _VERSION, kind, instance) + _FIELDS[kind].pack(*fields)


def unpack(frames: Sequence[bytes]) -> Message:
    """Checks and takes apart a message as it came from the wire.

    Raises:
        WireError: no header, foreign magic, another version, unknown kind, or fields of another length.
    """
    if not frames or len(frames[0]) < _HEADER.size:
        raise WireError(f"{len(frames)} frames, the first shorter than a header")
    magic, version, kind_code, instance = _HEADER.unpack_from(frames[0])
    if magic != _MAGIC:
        raise WireError(f"magic {magic!r} is not {_MAGIC!r}")
    if version != _VERSION:
        raise WireError(f"protocol version {version} is not {_VERSION}")
    try:
        kind = Kind(kind_code)
    except ValueError:
        raise WireError(f"message kind {kind_code} is unknown") from None
    body = frames[0][_HEADER.size :]
    layout = _FIELDS[kind]
    if len(body) != layout.size:
        raise WireError(f"{kind.name} has {len(body)} bytes of fields, not {layout.size}")
    return Message(kind, instance, layout.unpack(body), frames[1:])


def pack_ranks(ranks: Sequence[int]) -> bytes:
    """The second frame of MISSING."""
    return b"".join(map(_RANK.pack, ranks))


def unpack_ranks(frame: bytes) -> list[int]:
    """The inverse of `pack_ranks`. Raises `WireError` if the frame is no list of ranks."""
    if not frame or len(frame) % _RANK.size:
        raise WireError(f"a list of ranks cannot have {len(frame)} bytes")
    return [rank for (rank,) in _RANK.iter_unpack(frame)]


def proof(
    token: str, role: str, *, instance: int, rank: int, size: int, client_nonce: bytes, server_nonce: bytes
) -> bytes:
    """HMAC-SHA256 with the job token over everything that the handshake agreed on.

    `role` differs for the two sides, so that neither can answer with the other's proof; both nonces are in it, so that
    an overheard proof is worth nothing on another connection.
    """
    claim = struct.pack("<III", instance, rank, size)
    text = role.encode().ljust(8, b"\0") + claim + client_nonce + server_nonce
    return hmac.new(token.encode(), text, hashlib.sha256).digest()
