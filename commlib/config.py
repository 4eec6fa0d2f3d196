"""The settings of a Runtime: checked once, then read-only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass

from commlib.env import RING_MEMORIES, Env
from commlib.errors import ConfigError

__all__ = ["MAX_DECODE_TOKENS", "MAX_PROXY_THREADS", "MAX_TOPK", "RuntimeConfig"]

MAX_TOPK = 64
MAX_DECODE_TOKENS = 1024
MAX_PROXY_THREADS = 8  # kMaxFabricThreads in native/channel/device_fabric.hpp

# Tokens, experts and rows travel as signed 32-bit numbers in records and counters; the rest so in the native core.
_MAX_INDEX = 2**31 - 1
_INDICES = ("hidden", "num_experts", "max_tokens", "expert_alignment", "num_threads", "chunk_tokens", "max_in_flight")

# Room for the record (16 + 12 * MAX_TOPK bytes), rounded up: a ring slot holds it next to the row.
_MAX_RECORD_BYTES = 1024

# Fields that only concern the rank itself; everything else must be equal on all ranks.
_LOCAL_FIELDS = frozenset({"num_threads", "arena_bytes", "timeout_s"})


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Shape and limits of a Runtime. All sizes in bytes, all times in seconds.

    Attributes:
        hidden: columns of a token row.
        num_experts: experts over all ranks; a multiple of the number of ranks.
        num_topk: experts per token, at most `min(num_experts, 64)`.
        max_tokens: tokens per rank and dispatch that the first size of the arena is meant for; a limit on GPUs only.
        expert_alignment: every local expert's rows are padded to a multiple of this (layout "grouped").
        num_threads: worker threads of the CPU executor on this rank.
        num_proxy_threads: threads that carry bytes between nodes, each to and from some of the other nodes, at most 8.
        num_sms: multiprocessors that a kernel of the GPU executor takes.
        num_local_sms: multiprocessors for work that stays on the GPU (expand, reduce), if more than `num_sms`.
        out_blocks, in_blocks: between nodes, multiprocessors that serve a rank's own tokens on their way to other nodes
            and back, and those of other nodes, of the `num_sms` of a kernel; None: by the rates of the links, at most
            as many as there are other nodes. More blocks than rings serve those together. Of the latter fewer take part
            in a call whose rows go to fewer ranks than in balanced routing, and, unless their number is given, more
            where rows go to more ranks (GPU only).
        decode_tokens: most tokens of a rank in a call of the latency regime, for which there are slots, between nodes
            room in the heap, from construction on (GPU only); None: that regime is not used. Within a node a block's
            shared memory must hold what all ranks' tokens chose: 1024 tokens with 8 ranks, top-8 of 256 experts.
        chunk_tokens: tokens moved per signal over scale-up.
        chunk_bytes: bytes moved per put over scale-out (one row, if a row is larger).
        ring_bytes: bytes of one scale-out ring, which is also the most that is in flight to one peer. On links that
            drop what their queues cannot hold (TCP), more is slower; on long fast links less is (docs/performance.md).
        arena_bytes: initial heap of the arena; None = sized from the shape (GPUs: for one dispatch of uniform choices
            and its combine).
        max_arena_bytes: virtual size of the arena, up to which it may grow.
        max_in_flight: operations issued but not yet finished, at most; a further one waits for room.
        timeout_s: seconds without progress after which a wait raises.
        heartbeat_timeout_s: seconds without a heartbeat after which a peer counts as lost.
        transport: name of the scale-out transport.
        ring_memory: where the rings of a GPU's Runtime lie: "host" (pinned) or "device" (the GPU's memory, which saves
            a row two ways over PCIe). With "device" over UCX every call waits for its kernel, and nobody may copy
            between pageable memory and the device while a graph with calls is replayed: docs/design.md, section 10.
        use_tuned_plan: whether a plan that `commlib bench --tune` has found for this shape and topology replaces
            `chunk_tokens`, `chunk_bytes`, `ring_bytes`, `out_blocks` and `in_blocks` where they have their defaults and
            the environment says nothing. Without one, GPUs of several nodes get chunks of 256 KiB in rings of 4 MiB,
            unless either is set.

    Raises:
        ConfigError: a value breaks a rule; the message holds the value and the rule.
    """

    hidden: int
    num_experts: int
    num_topk: int
    max_tokens: int = 4096
    expert_alignment: int = 128
    num_threads: int = 1
    num_proxy_threads: int = 1
    num_sms: int = 24
    num_local_sms: int | None = None
    out_blocks: int | None = None
    in_blocks: int | None = None
    decode_tokens: int | None = None
    chunk_tokens: int = 32
    chunk_bytes: int = 64 * 1024
    ring_bytes: int = 1024 * 1024
    arena_bytes: int | None = None
    max_arena_bytes: int = 64 * 1024**3
    max_in_flight: int = 8
    timeout_s: float = 300.0
    heartbeat_timeout_s: float = 10.0
    transport: str = "ucx"
    ring_memory: str = "host"
    use_tuned_plan: bool = True

    def __post_init__(self) -> None:
        self._check_types()
        if self.num_proxy_threads > MAX_PROXY_THREADS:
            raise ConfigError(f"num_proxy_threads={self.num_proxy_threads} is above {MAX_PROXY_THREADS}")
        if self.decode_tokens is not None and self.decode_tokens > MAX_DECODE_TOKENS:
            raise ConfigError(f"decode_tokens={self.decode_tokens} is above {MAX_DECODE_TOKENS}")
        for name in _INDICES:
            if getattr(self, name) > _MAX_INDEX:
                raise ConfigError(f"{name}={getattr(self, name)} does not fit 32 bits; the limit is {_MAX_INDEX}")
        limit = min(self.num_experts, MAX_TOPK)
        if self.num_topk > limit:
            raise ConfigError(
                f"num_topk={self.num_topk} is above min(num_experts={self.num_experts}, {MAX_TOPK})={limit}"
            )
        if self.ring_bytes < 2 * self.chunk_bytes:
            raise ConfigError(
                f"ring_bytes={self.ring_bytes} is below 2 * chunk_bytes={2 * self.chunk_bytes}: "
                "one chunk must be able to travel while the next is filled"
            )
        slot_bytes = 4 * self.hidden + _MAX_RECORD_BYTES
        if self.ring_bytes < 2 * slot_bytes:
            raise ConfigError(
                f"ring_bytes={self.ring_bytes} is below {2 * slot_bytes}: "
                f"a ring must hold two FP32 rows of hidden={self.hidden} with their records"
            )
        if self.num_local_sms is not None and self.num_local_sms < self.num_sms:
            raise ConfigError(f"num_local_sms={self.num_local_sms} is below num_sms={self.num_sms}")
        if (self.out_blocks or 1) + (self.in_blocks or 1) >= max(self.num_sms, 3):
            raise ConfigError(
                f"out_blocks={self.out_blocks} and in_blocks={self.in_blocks} leave none of num_sms={self.num_sms} for "
                "local work"
            )
        if self.arena_bytes is not None and self.arena_bytes > self.max_arena_bytes:
            raise ConfigError(f"arena_bytes={self.arena_bytes} is above max_arena_bytes={self.max_arena_bytes}")

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "transport":
                if not isinstance(value, str) or not value:
                    raise ConfigError(f"transport={value!r} is not a non-empty name")
            elif field.name == "ring_memory":
                if value not in RING_MEMORIES:
                    raise ConfigError(f"ring_memory={value!r} is not one of {'|'.join(RING_MEMORIES)}")
            elif field.name in ("timeout_s", "heartbeat_timeout_s"):
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if not (is_number and math.isfinite(value) and value > 0):
                    raise ConfigError(f"{field.name}={value!r} is not a finite number of seconds > 0")
            elif (
                field.name in ("arena_bytes", "num_local_sms", "out_blocks", "in_blocks", "decode_tokens")
                and value is None
            ):
                continue
            elif field.name == "use_tuned_plan":
                if not isinstance(value, bool):
                    raise ConfigError(f"use_tuned_plan={value!r} is neither True nor False")
            elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{field.name}={value!r} is not an integer >= 1")

    def with_env(self, env: Env) -> RuntimeConfig:
        """A copy in which timeouts, threads, transport, chunks, rings and blocks follow `env` where it sets them."""
        overrides = {
            "timeout_s": env.timeout_s,
            "heartbeat_timeout_s": env.heartbeat_timeout_s,
            "num_threads": env.num_threads,
            "num_proxy_threads": env.num_proxy_threads,
            "transport": env.transport,
            "ring_memory": env.ring_memory,
            "chunk_tokens": env.chunk_tokens,
            "chunk_bytes": env.chunk_bytes,
            "ring_bytes": env.ring_bytes,
            "out_blocks": env.out_blocks,
            "in_blocks": env.in_blocks,
        }
        return dataclasses.replace(self, **{k: v for k, v in overrides.items() if v is not None})  # type: ignore[arg-type]

    def shared(self) -> dict[str, int | str | None]:
        """The fields that must be equal on all ranks."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _LOCAL_FIELDS}

    def digest(self) -> int:
        """63-bit hash of the fields that must be equal on all ranks; the same in every process and version.

        Threads, timeout and the initial heap are left out: ranks may differ in them. The heartbeat's timeout counts: a
        peer's also sets how often it beats.
        """
        text = json.dumps(self.shared(), sort_keys=True, separators=(",", ":"))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def check_ranks(self, num_ranks: int) -> None:
        """Raises ConfigError unless the experts spread evenly over `num_ranks` ranks."""
        if num_ranks < 1:
            raise ConfigError(f"num_ranks={num_ranks} is below 1")
        if self.num_experts % num_ranks:
            raise ConfigError(f"num_experts={self.num_experts} is not divisible by num_ranks={num_ranks}")
