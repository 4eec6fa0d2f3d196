"""What has gone wrong: missed deadlines, lost processes, refusals that nobody waited for."""

from __future__ import annotations

import logging
from typing import Any

from commlib.config import RuntimeConfig
from commlib.cuda.calls import fault_error, peer_lost_error, phase_of, refusal
from commlib.cuda.host_page import HostPage
from commlib.cuda.kernels import Buffers
from commlib.cuda.memory import Arena
from commlib.cuda.params import HostResult
from commlib.cuda.tiers import Tiers
from commlib.errors import CommError, CommTimeout

__all__ = ["Watch"]

_logger = logging.getLogger("commlib.cuda")


class Watch:
    """A fault is terminal for the Runtime, a refusal is not."""

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        config: RuntimeConfig,
        page: HostPage,
        arena: Arena,
        buffers: Buffers,
        tiers: Tiers | None,
    ):
        self.fault: CommError | None = None
        self._rank, self._num_ranks, self._config = rank, num_ranks, config
        self._page, self._arena, self._buffers, self._tiers = page, arena, buffers, tiers

    def check_faults(self) -> None:
        """Raises the fault of this Runtime, if any. In whatever call: all ranks have it, so it sets none apart."""
        if self.fault is None:
            board = self._buffers.board
            if board.kind:
                self.fault = fault_error(board, self._rank, self._config.timeout_s)
                if self._tiers is not None:
                    self._tiers.tell(board, phase_of(board), self._config.timeout_s)
            elif self._tiers is not None and (found := self._tiers.fault()) is not None:
                self.fault = found
                self._buffers.end_kernels()
            elif (peer := self._page.lost_peer()) is not None:
                self.fault = peer_lost_error(self._rank, peer)
                if self._tiers is not None:
                    self._tiers.tell_lost(peer)
                self._buffers.end_kernels()
        if self.fault is not None:
            raise self.fault

    def take_refusal(self) -> CommError | None:
        """Of an operation that nobody waited for.

        Only where ranks ask for it by themselves: raised in place of an operation, at whatever moment a kernel got to
        write it, it would set ranks apart in what they issue.
        """
        refused = self._buffers.refused
        if not refused.ticket:
            return None
        copy = HostResult.from_buffer_copy(refused)
        refused.ticket = 0
        return refusal(copy, self._num_ranks, self._config.num_topk, self._config.num_experts)

    def fail(self, error: CommError) -> CommError:
        """The Runtime is of no further use."""
        self.fault = self.fault or error
        self._buffers.end_kernels()
        return self.fault

    def device_silent(self, ticket: int, kind: str, seen: int, what: str = "start") -> CommError:
        """An operation has not begun, or ended, long after its deadline."""
        return self.fail(
            CommTimeout(
                f"rank {self._rank}: the device did not {what} operation {ticket}",
                rank=self._rank, peer=None, channel="device", phase=kind, tag=ticket, expected=ticket, seen=seen,
            )
        )  # fmt: skip

    def abandon(self) -> None:
        """Tells all ranks that this one leaves, if the device still can."""
        if self.fault is not None:
            return
        self.fail(peer_lost_error(self._rank, self._rank))
        if self._tiers is not None:
            self._tiers.tell_left()
        bases: list[Any] = [base for base in self._arena.base if base]
        try:
            self._buffers.raise_fault(bases, self._arena.regions, self._rank, self._rank)
        except Exception as error:  # on the way out of another one: the peers' own watches find this process gone
            _logger.debug("rank %d could not tell that it leaves: %s", self._rank, error)
