"""A rank that is lost: the same kind of error on all others, wherever they stood, and a way out that waits for nobody.

Most of a step's waits are commlib's, and raise its errors. Who stands in a collective of torch.distributed when a rank
goes hears only that a socket was closed, and asks commlib who it was.
"""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

import commlib
from commlib.errors import CommError, CommTimeout, PeerLostError, TransportError

# What a restart with fewer ranks can help against; a ConfigError would come again.
FAULTS = (PeerLostError, CommTimeout, TransportError)
EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again
_TICKS_S = 1.0  # a lost heartbeat is looked for every twentieth of its limit, and machines are busy


def as_fault(error: BaseException, runtime: commlib.Runtime) -> CommError | None:
    """commlib's error in place of one of torch.distributed's that a lost rank has caused; None for all others.

    Waits until the heartbeat of the lost rank is overdue. If it was one of another row of ranks, with a Runtime of
    their own, or if nobody is lost, it is a TransportError without a name.
    """
    if not _is_of_torch_distributed(error):
        return None
    end = time.monotonic() + runtime.config.heartbeat_timeout_s + _TICKS_S
    while time.monotonic() < end:
        try:
            runtime.check()
        except CommError as fault:
            return fault
        time.sleep(0.02)
    return TransportError(f"torch.distributed failed: {error}", call="torch.distributed", code=-1)


def _is_of_torch_distributed(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    # Gloo's own exceptions have no type: they name a file of its sources. Checkpoints wrap them.
    return isinstance(error, RuntimeError | CheckpointException) and "gloo/" in str(error)


def leave(rank: int, fault: CommError) -> NoReturn:
    """Ends the process and says why.

    At once: in order, it would wait for the lost rank in MPI_Finalize, and in the thread that writes a checkpoint.
    """
    print(f"rank {rank}: {type(fault).__name__}: {fault}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(EXIT_STATUS)
