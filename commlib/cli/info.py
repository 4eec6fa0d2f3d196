"""`commlib info`: what this machine offers and what commlib would use."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import platform
import resource
from typing import Any

from commlib.env import read_env
from commlib.layout import format_bytes
from commlib.topology import node_key


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help="versions, shared memory, limits, environment")
    parser.set_defaults(run=run)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else format_bytes(value)


def run(arguments: argparse.Namespace) -> int:
    from commlib import _native  # here: hosts that only use GPUs may have none

    shm = os.statvfs("/dev/shm")
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    print(f"commlib {_version('commlib')}, Python {platform.python_version()}, {platform.machine()}")
    print(f"row kernels: {_native.row_kernels()}")
    print(f"transport ucx: {_native.ucx_version()}")
    print(f"transport verbs: {_native.describe_verbs()}")
    for package in ("torch", "mpi4py", "pyzmq", "numpy", "cupy-cuda13x"):
        print(f"{package}: {_version(package)}")
    print(f"/dev/shm: {format_bytes(shm.f_bavail * shm.f_frsize)} free of {format_bytes(shm.f_blocks * shm.f_frsize)}")
    print(f"locked memory limit: {_limit(memlock)}")
    print(f"cores: {len(os.sched_getaffinity(0))}")
    print(f"node key: {node_key()}")
    env = read_env()  # what was read; its repr leaves out the secret, and defaults say nothing
    told = [field for field in dataclasses.fields(env) if field.repr and getattr(env, field.name) != field.default]
    print("environment:", ", ".join(f"{field.name}={getattr(env, field.name)!r}" for field in told) or "nothing set")
    return 0
