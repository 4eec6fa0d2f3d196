from pathlib import Path

import pytest

from commlib.env import Env, cache_folder, read_env
from commlib.errors import ConfigError


def test_nothing_set_gives_defaults() -> None:
    assert read_env({"PATH": "/bin", "XCOMMLIB_RANK": "1"}) == Env()
    assert Env().log is None and Env().bootstrap == "auto" and Env().timeout_s is None


def test_every_variable() -> None:
    env = read_env(
        {
            "COMMLIB_RANKS_PER_NODE": "2",
            "COMMLIB_TIMEOUT": "1.5",
            "COMMLIB_HEARTBEAT_TIMEOUT": "3",
            "COMMLIB_LOG": "debug",
            "COMMLIB_RENDEZVOUS": "tcp://[::1]:2900",
            "COMMLIB_JOB_TOKEN": "s3cret value",
            "COMMLIB_RANK": "3",
            "COMMLIB_WORLD_SIZE": "4",
            "COMMLIB_TRANSPORT": "loopback",
            "COMMLIB_RING_MEMORY": "device",
            "COMMLIB_NUM_THREADS": "6",
            "COMMLIB_BOOTSTRAP": "zmq",
            "COMMLIB_CHUNK_TOKENS": "16",
            "COMMLIB_CHUNK_BYTES": "65536",
            "COMMLIB_RING_BYTES": "4294967296",
            "COMMLIB_OUT_BLOCKS": "2",
            "COMMLIB_IN_BLOCKS": "3",
            "COMMLIB_NICS": "mlx5_0,mlx5_bond_1:2",
            "COMMLIB_MAX_NICS": "2",
            "COMMLIB_GID_INDEX": "0",
            "COMMLIB_MTU": "1024",
            "COMMLIB_ACK_TIMEOUT": "18",
            "COMMLIB_RETRY_COUNT": "7",
            "COMMLIB_RNR_RETRY_COUNT": "0",
            "COMMLIB_TRAFFIC_CLASS": "255",
            "COMMLIB_SERVICE_LEVEL": "3",
            "COMMLIB_SIGNAL": "immediate",
            "COMMLIB_SEND_OPERATIONS": "64",
            "COMMLIB_SEND_BYTES": "1500000",
        }
    )
    assert env == Env(
        ranks_per_node=2,
        timeout_s=1.5,
        heartbeat_timeout_s=3.0,
        log="debug",
        rendezvous="tcp://[::1]:2900",
        job_token="s3cret value",
        rank=3,
        world_size=4,
        transport="loopback",
        ring_memory="device",
        num_threads=6,
        bootstrap="zmq",
        chunk_tokens=16,
        chunk_bytes=65536,
        ring_bytes=4294967296,
        out_blocks=2,
        in_blocks=3,
        nics=("mlx5_0", "mlx5_bond_1:2"),
        max_nics=2,
        gid_index=0,
        mtu=1024,
        ack_timeout=18,
        retry_count=7,
        rnr_retry_count=0,
        traffic_class=255,
        service_level=3,
        signal="immediate",
        send_operations=64,
        send_bytes=1500000,
    )
    assert "s3cret" not in repr(env)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("COMMLIB_RANKS_PER_NODE", "0"),
        ("COMMLIB_RANKS_PER_NODE", "two"),
        ("COMMLIB_NUM_THREADS", "1_0"),
        ("COMMLIB_NUM_THREADS", ""),
        ("COMMLIB_RANK", "-1"),
        ("COMMLIB_WORLD_SIZE", "0"),
        ("COMMLIB_TIMEOUT", "0"),
        ("COMMLIB_TIMEOUT", "inf"),
        ("COMMLIB_TIMEOUT", "nan"),
        ("COMMLIB_HEARTBEAT_TIMEOUT", "-2"),
        ("COMMLIB_HEARTBEAT_TIMEOUT", "soon"),
        ("COMMLIB_LOG", "verbose"),
        ("COMMLIB_BOOTSTRAP", "slurm"),
        ("COMMLIB_RENDEZVOUS", "host:1"),
        ("COMMLIB_RENDEZVOUS", "tcp://host"),
        ("COMMLIB_RENDEZVOUS", "tcp://host:70000"),
        ("COMMLIB_RENDEZVOUS", "tcp://host:0"),
        ("COMMLIB_TRANSPORT", ""),
        ("COMMLIB_RING_MEMORY", "gpu"),
        ("COMMLIB_CHUNK_TOKENS", "0"),
        ("COMMLIB_CHUNK_BYTES", "64K"),
        ("COMMLIB_RING_BYTES", "999999999999999999"),
        ("COMMLIB_OUT_BLOCKS", "0"),
        ("COMMLIB_IN_BLOCKS", "-1"),
        ("COMMLIB_NICS", ""),
        ("COMMLIB_NICS", "mlx5_0,"),
        ("COMMLIB_NICS", "mlx5_0:0"),
        ("COMMLIB_NICS", "mlx5 0"),
        ("COMMLIB_MAX_NICS", "0"),
        ("COMMLIB_MAX_NICS", "3000000000"),
        ("COMMLIB_NUM_THREADS", "3000000000"),
        ("COMMLIB_SEND_BYTES", "999999999999999999"),
        ("COMMLIB_GID_INDEX", "256"),
        ("COMMLIB_MTU", "1500"),
        ("COMMLIB_ACK_TIMEOUT", "0"),
        ("COMMLIB_ACK_TIMEOUT", "32"),
        ("COMMLIB_RETRY_COUNT", "8"),
        ("COMMLIB_RNR_RETRY_COUNT", "-1"),
        ("COMMLIB_TRAFFIC_CLASS", "256"),
        ("COMMLIB_SERVICE_LEVEL", "16"),
        ("COMMLIB_SIGNAL", "imm"),
        ("COMMLIB_SEND_OPERATIONS", "0"),
        ("COMMLIB_SEND_BYTES", "1e6"),
    ],
)
def test_bad_value_names_variable_value_and_rule(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_env({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}={value!r} is not ") and len(message) > len(f"{name}={value!r} is not ")


def test_caches_lie_where_the_xdg_specification_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for environ in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "cache"}):
        assert cache_folder(environ) == Path("/home/somebody/.cache/commlib")
    assert cache_folder({"XDG_CACHE_HOME": "/scratch/cache"}) == Path("/scratch/cache/commlib")


def test_blank_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="COMMLIB_JOB_TOKEN is set but blank"):
        read_env({"COMMLIB_JOB_TOKEN": "  "})


def test_unknown_name_suggests_a_close_one() -> None:
    with pytest.raises(ConfigError, match="COMMLIB_TIMOUT; did you mean COMMLIB_TIMEOUT"):
        read_env({"COMMLIB_TIMOUT": "1"})
    with pytest.raises(ConfigError, match="unknown environment variable COMMLIB_QQ; known: COMMLIB_RANKS_PER_NODE"):
        read_env({"COMMLIB_QQ": "1"})


def test_rank_must_be_below_world_size() -> None:
    with pytest.raises(ConfigError, match="COMMLIB_RANK=2 is not below COMMLIB_WORLD_SIZE=2"):
        read_env({"COMMLIB_RANK": "2", "COMMLIB_WORLD_SIZE": "2"})


def test_reads_the_process_environment_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMLIB_NUM_THREADS", "5")
    assert read_env().num_threads == 5
