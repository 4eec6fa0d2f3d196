from typing import Any

import pytest

from commlib import _native
from commlib.env import Env
from commlib.errors import TransportError
from commlib.transport import transport_options


def test_defaults_are_the_native_ones() -> None:
    options = transport_options(Env())
    assert options.nics == [] and options.max_nics == 1 and options.gid_index == -1 and options.mtu == 0
    # 7 retries are for ever on soft-RoCE, and a dead peer would never be noticed.
    assert options.retry_count == 6 and options.rnr_retry_count == 7
    assert not options.signal_by_immediate


SET: dict[str, Any] = {
    "max_nics": 3,
    "gid_index": 5,
    "mtu": 2048,
    "ack_timeout": 12,
    "retry_count": 1,
    "rnr_retry_count": 2,
    "traffic_class": 106,
    "service_level": 4,
    "send_operations": 33,
    "send_bytes": 123456,
}


@pytest.mark.parametrize("name", SET)
def test_what_is_set_is_passed_on(name: str) -> None:
    assert getattr(transport_options(Env(**{name: SET[name]})), name) == SET[name]


def test_names_and_signals_are_translated() -> None:
    options = transport_options(Env(nics=("mlx5_0", "mlx5_1:2"), signal="immediate"))
    assert options.nics == ["mlx5_0", "mlx5_1:2"] and options.signal_by_immediate
    assert not transport_options(Env(signal="write")).signal_by_immediate


def test_verbs_without_the_port_is_an_error_that_says_so() -> None:
    options = transport_options(Env(nics=("no_such_port",)))
    with pytest.raises(TransportError, match="rank 1: verbs: "):
        _native.GoodputProbe("verbs", 1, 2, 4096, 4, options)
