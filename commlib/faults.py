"""From a native outcome to the exception that the caller sees."""

from __future__ import annotations

from typing import Any

from commlib.errors import CapacityError, CommError, CommTimeout, ConfigError, PeerLostError, TransportError

__all__ = ["error_of"]

# FaultKind in native/common/fault.hpp.
_TIMEOUT, _PEER_LOST, _TRANSPORT = 1, 2, 3


def error_of(outcome: Any, rank: int) -> CommError:
    """The exception for an outcome that is not DONE, as `rank` raises it."""
    kind = outcome.kind.name
    if kind == "REJECTED":
        return ConfigError(outcome.message)
    if kind == "CAPACITY":
        return CapacityError(outcome.message, needed=outcome.needed, available=outcome.available)
    return _fault_error(outcome, outcome.fault, rank)


def _channel(fault_channel: int, rank: int) -> str:
    return f"{fault_channel} -> {rank}" if fault_channel >= 0 else "-"


def _fault_error(outcome: Any, fault: dict[str, Any], rank: int) -> CommError:
    phase = outcome.waited_phase
    where = f"rank {rank} was in {phase}"
    if outcome.waited_channel >= 0:
        where += f" on channel {_channel(outcome.waited_channel, rank)}"
    noticed = f"rank {fault['rank']} noticed it in {fault['phase']}"
    if fault["kind"] == _TIMEOUT:
        return CommTimeout(
            f"rank {fault['rank']} waited for rank {fault['peer']} in {fault['phase']} on channel "
            f"{_channel(fault['channel'], fault['rank'])}, epoch {fault['tag']}: expected {fault['expected']}, "
            f"seen {fault['seen']}; {fault['detail']}; {where}",
            rank=fault["rank"],
            peer=fault["peer"] if fault["peer"] >= 0 else None,
            channel=_channel(fault["channel"], fault["rank"]),
            phase=fault["phase"],
            tag=fault["tag"],
            expected=fault["expected"],
            seen=fault["seen"],
        )
    if fault["kind"] == _PEER_LOST:
        return PeerLostError(
            f"rank {fault['peer']} is lost: {fault['detail']}; {noticed}; {where}",
            rank=fault["rank"],
            peer=fault["peer"],
            channel=_channel(outcome.waited_channel, rank),
            phase=phase,
        )
    return TransportError(
        f"transport failed: {fault['detail']}; {noticed}; {where}",
        call=fault["phase"],
        code=fault["code"],
        peer=fault["peer"] if fault["peer"] >= 0 else None,
    )
