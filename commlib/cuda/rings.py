"""Where the rings between nodes lie: in host memory, or in GPU memory if the transport takes it from there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from commlib.bootstrap import Bootstrap
from commlib.bootstrap.agreement import allgather_or_raise
from commlib.cuda.driver import export_dmabuf, has_ordered_rdma, thread_setup
from commlib.cuda.memory import Segment
from commlib.errors import ConfigError, TransportError
from commlib.fabric import RingPlace
from commlib.layout import align_up, format_bytes

__all__ = ["RingMemory", "open_with_rings"]

_logger = logging.getLogger("commlib.cuda")

_PIECE = 2 << 20  # an allocation of such a size shares no page with another, which a peer would map as well

_unused: dict[int, list[Segment]] = {}  # by device; of Runtimes that were closed


class RingMemory:
    """Device memory of one rank for its rings. The current CUDA device is the rank's.

    It stays allocated until the process ends: the UCX of other processes keeps it mapped for as long as they live, and
    freeing what another process has mapped is undefined. The next Runtime gets it, if all ranks have agreed to close
    the last one; otherwise a peer may still write there, and it is not used again.

    Args:
        num_bytes: at least.

    Raises:
        CapacityError: the device has less memory.
    """

    def __init__(self, num_bytes: int) -> None:
        self._device = torch.cuda.current_device()
        kept = _unused.setdefault(self._device, [])
        fitting = [segment for segment in kept if segment.num_bytes >= num_bytes]
        if fitting:
            self._segment: Segment | None = min(fitting, key=lambda segment: segment.num_bytes)
            kept.remove(self._segment)
        else:
            self._segment = Segment(align_up(num_bytes, _PIECE))
        self.address, self.num_bytes = self._segment.address, self._segment.num_bytes

    def export(self) -> int:
        """A dmabuf of the memory, the caller's to close; -1: the driver gives none."""
        return export_dmabuf(self.address, self.num_bytes)

    def release(self, *, is_quiet: bool) -> None:
        """`is_quiet`: no rank puts anything there any more."""
        segment, self._segment = self._segment, None
        if segment is None:
            return
        if is_quiet:
            _unused[self._device].append(segment)
        else:
            _logger.warning("%s of rings stay allocated: peers may still write there", format_bytes(self.num_bytes))


def open_with_rings(
    boot: Bootstrap,
    choice: str,
    num_bytes: int,
    is_verbs: bool,
    open_fabric: Callable[[RingPlace | None], Any],
    timeout_s: float,
) -> tuple[Any, RingMemory | None, str]:
    """A native Fabric that is started and ready for puts, the memory of its rings and where that is. Collective.

    Args:
        boot: the ranks.
        choice: "host" or "device".
        num_bytes: that this rank's rings take.
        is_verbs: the transport; otherwise UCX.
        open_fabric: collective; makes a connected Fabric with rings there, or in host memory.
        timeout_s: seconds within which all ranks must come.

    Returns:
        The fabric, the memory (None: the fabric's own) and a text for the log.

    Raises:
        ConfigError, CapacityError, TransportError: on all ranks.
    """
    if choice == "device":
        if not is_verbs:
            _logger.warning("rings in GPU memory, over UCX: calls wait for their kernels (docs/design.md, section 10)")
        fabric, memory = _open_on_device(boot, num_bytes, is_verbs, open_fabric, timeout_s)
        return fabric, memory, "GPU memory"
    fabric = open_fabric(None)
    fabric.start()
    return fabric, None, "pinned host memory"


def _open_on_device(
    boot: Bootstrap,
    num_bytes: int,
    is_verbs: bool,
    open_fabric: Callable[[RingPlace | None], Any],
    timeout_s: float,
) -> tuple[Any, RingMemory]:
    memory: RingMemory | None = None
    place: RingPlace | None = None
    fabric: Any = None
    has_started = False

    def take() -> bytes:
        nonlocal memory, place
        if is_verbs and not has_ordered_rdma(torch.cuda.current_device()):
            raise ConfigError(
                "what a card writes to this GPU needs a flush before kernels see it: rings stay in host memory"
            )
        memory = RingMemory(num_bytes)
        export = memory.export if is_verbs else None
        place = RingPlace(memory.address, num_bytes, export, thread_setup(torch.cuda.current_device()))
        return b""

    def check() -> bytes:
        if fabric.ring_reach() == "unseen":
            raise ConfigError(
                "the transport takes GPU memory for the host's: UCX without its CUDA modules, or a UCX_TLS without "
                "cuda_copy and cuda_ipc"
            )
        return b""

    def wait_ready() -> bytes:
        if not fabric.wait_ready(timeout_s):
            found = fabric.fault()
            told = f"none within {timeout_s:g} s" if found is None else f"rank {found['rank']}: {found['detail']}"
            raise TransportError(f"no put between GPUs: {told}", call="first put", code=0)
        return b""

    try:
        allgather_or_raise(boot, take, timeout_s=timeout_s)
        assert memory is not None
        fabric = open_fabric(place)
        allgather_or_raise(boot, check, timeout_s=timeout_s)
        has_started = True
        fabric.start()
        allgather_or_raise(boot, wait_ready, timeout_s=timeout_s + 5.0)
    except BaseException:
        if has_started:
            fabric.stop(False)
        fabric = None  # before its memory
        if memory is not None:
            memory.release(is_quiet=not has_started)
        raise
    return fabric, memory
