import pickle

import pytest

from commlib import errors

CASES = [
    errors.CommError("plain"),
    errors.ConfigError("a rule"),
    errors.TransportError("failed", call="ucp_put_nbx", code=-25, peer=3),
    errors.CommTimeout("late", rank=1, peer=None, channel="c", phase="exchange", tag=7, expected=4, seen=3),
    errors.PeerLostError("gone", rank=0, peer=2, channel="heartbeat", phase="combine"),
    errors.CapacityError("full", needed=10, available=4),
]


@pytest.mark.parametrize("error", CASES, ids=lambda error: type(error).__name__)
def test_pickle_keeps_type_message_and_values(error: errors.CommError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) != ""
    assert vars(copy) == vars(error)


def test_values_are_attributes() -> None:
    assert (CASES[2].call, CASES[2].code, CASES[2].peer) == ("ucp_put_nbx", -25, 3)
    timeout = CASES[3]
    assert (timeout.rank, timeout.peer, timeout.channel, timeout.phase) == (1, None, "c", "exchange")
    assert (timeout.tag, timeout.expected, timeout.seen) == (7, 4, 3)
    assert (CASES[4].rank, CASES[4].peer) == (0, 2)
    assert (CASES[5].needed, CASES[5].available) == (10, 4)


def test_hierarchy() -> None:
    assert all(isinstance(error, errors.CommError) and isinstance(error, RuntimeError) for error in CASES)
    assert isinstance(CASES[1], ValueError)
