"""A rendezvous whose ranks are threads of this process, for the tests of the ZeroMQ bootstrap."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from commlib.bootstrap.rendezvous import RendezvousBootstrap
from commlib.testing.spawn import free_port

TOKEN = "a token of this test"


@dataclass
class Job:
    """A rendezvous that nobody has come to yet; `join` brings a rank, in a thread of its own."""

    endpoint: str
    pool: ThreadPoolExecutor

    def join(self, rank: int, size: int, timeout_s: float = 10.0) -> Future[RendezvousBootstrap]:
        return self.pool.submit(self.enter, rank, size, timeout_s)

    def enter(self, rank: int, size: int, timeout_s: float = 10.0, token: str = TOKEN) -> RendezvousBootstrap:
        return RendezvousBootstrap(endpoint=self.endpoint, token=token, rank=rank, size=size, timeout_s=timeout_s)

    def open(self, size: int) -> list[RendezvousBootstrap]:
        return [future.result() for future in [self.join(rank, size) for rank in range(size)]]

    def on_all(self, ranks: list[RendezvousBootstrap], call: Callable[[RendezvousBootstrap], Any]) -> list[Any]:
        return [future.result() for future in [self.pool.submit(call, rank) for rank in ranks]]


@contextmanager
def new_job() -> Iterator[Job]:
    with ThreadPoolExecutor(16) as pool:
        yield Job(f"tcp://127.0.0.1:{free_port()}", pool)


def close_all(ranks: list[RendezvousBootstrap]) -> None:
    for rank in ranks:
        rank.close()


def server_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "commlib-rendezvous"]


def wait_for(condition: Callable[[], bool], timeout_s: float = 5.0) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()
