"""`commlib bench --device cuda --nccl`: the same rows by torch permutations and NCCL's all-to-all."""

from __future__ import annotations

import socket
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from commlib.bootstrap import Bootstrap
from commlib.cli.routed_rows import RoutedRows
from commlib.testing.torch_exchange import TorchDispatched, TorchExchange

__all__ = ["NcclBaseline", "open_process_group"]

_TIMEOUT_S = 60.0


def open_process_group(boot: Bootstrap, backend: str) -> None:
    """The ranks of `boot` as the default group of torch.distributed. Collective."""
    hosts = [name.decode() for name in boot.allgather(socket.gethostname().encode(), timeout_s=_TIMEOUT_S)]
    host = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    store = dist.TCPStore(host, 0, boot.size, is_master=True, wait_for_workers=False) if boot.rank == 0 else None  # type: ignore[attr-defined]
    port = boot.allgather(str(store.port if store else "").encode(), timeout_s=_TIMEOUT_S)[0].decode()
    if store is None:
        store = dist.TCPStore(host, int(port), boot.size, is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=boot.rank, world_size=boot.size)


class NcclBaseline:
    """Dispatch and weighted combine of `RoutedRows`; the process group is open."""

    def __init__(self, rows: RoutedRows, num_experts: int, expert_alignment: int) -> None:
        self._rows = rows
        self._exchange = TorchExchange(None, num_experts, expert_alignment)

    def dispatch(self, which: int) -> TorchDispatched:
        with torch.no_grad():
            return self._exchange.dispatch(self._rows.own(), self._rows.choices(which), self._rows.weights)

    def combine(self, got: TorchDispatched) -> Tensor:
        """Of the rows themselves, times their weights."""
        with torch.no_grad():
            return self._exchange.combine(got.x * got.row_weights[:, None].to(got.x.dtype), got.handle)

    def check(self, which: int, config: Any) -> TorchDispatched:
        """Raises AssertionError unless rows and sums are right; returns a dispatch for `combine`."""
        got = self.dispatch(which)
        self._rows.check_dispatched(which, got, "grouped", None, config)
        self._rows.check_summed(which, self.combine(got))
        return got
