"""Checks of the caller's CUDA tensors, and the words in which ranks compare and reject calls."""

from __future__ import annotations

import struct
from typing import Any

import torch

from commlib.config import RuntimeConfig
from commlib.cuda.params import CallWords, HostResult
from commlib.errors import CapacityError, CommError, CommTimeout, ConfigError, PeerLostError
from commlib.handle import Handle
from commlib.layout import format_bytes, num_scales
from commlib.payload import require_memory

__all__ = [
    "CASTS",
    "DTYPES",
    "ELEMENT_BYTES",
    "KINDS",
    "LAYOUTS",
    "aligned",
    "check_alignment",
    "check_capacity",
    "check_handle",
    "check_routing",
    "check_rows",
    "check_tensor",
    "fault_error",
    "pack_handle",
    "peer_lost_error",
    "phase_of",
    "refusal",
    "unpack_handle",
]

KINDS = {"dispatch": 1, "cached_dispatch": 2, "combine": 3, "barrier": 4, "grow": 5}
CASTS = {None: 0, "fp32": 1, "pow2": 2}
LAYOUTS = {"grouped": 0, "rows": 1}
DTYPES = ("float32", "bfloat16", "float8_e4m3fn")  # by code, see native/common/types.hpp

ELEMENT_BYTES = (4, 2, 1)
_PAYLOADS = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)

_REJECTED = 4
_PEER_LOST = 2  # FaultNote::kind
_PHASES = {
    1: "exchange",
    2: "dispatch/expand",
    3: "combine/final_reduce",
    4: "latency/room",
    5: "latency/take_in",
    6: "latency/add_up",
    7: "scale_out",
    8: "dispatch/forward",
    9: "combine/receive",
    10: "combine/forward_reduce",
}


def check_tensor(
    tensor: Any, name: str, device: Any, dtypes: tuple[Any, ...], labels: tuple[str, ...], sizes: tuple[int | None, ...]
) -> Any:
    """`tensor` as contiguous memory of `device`, 16-byte aligned; copied if it is not.

    Args:
        tensor: of the caller.
        name, labels: for messages: of the tensor and of its dimensions.
        device: where it must be.
        dtypes: what it may be.
        sizes: of its dimensions; None stands for any size.

    Raises:
        ConfigError: it is no tensor of that device, dtype and shape.
    """
    if not isinstance(tensor, torch.Tensor):
        raise ConfigError(f"{name} is a {type(tensor).__name__}, not a torch tensor")
    require_memory(tensor, name)
    if tensor.device != device:
        raise ConfigError(f"{name} is on {tensor.device}, the Runtime on {device}")
    if tensor.dtype not in dtypes:
        raise ConfigError(f"{name} has dtype {_name_of(tensor.dtype)}, not {' or '.join(map(_name_of, dtypes))}")
    shape = tensor.shape
    if shape != sizes and not _fits(shape, sizes):
        named = zip(labels, sizes, strict=True)
        meaning = ", ".join(label if want is None else f"{label}={want}" for label, want in named)
        raise ConfigError(f"{name} has shape {list(shape)}, not [{meaning}]")
    return tensor if _is_aligned(tensor) else aligned(tensor.detach())


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as contiguous memory at a multiple of 16 bytes, as wide loads and bulk copies want it; a copy if need
    be."""
    tensor = tensor.contiguous()
    return tensor if _is_aligned(tensor) else tensor.clone()


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _fits(shape: tuple[int, ...], sizes: tuple[int | None, ...]) -> bool:
    pairs = zip(shape, sizes, strict=False)
    return len(shape) == len(sizes) and all(want is None or have == want for have, want in pairs)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_handle(handle: Any, runtime_id: int) -> Any:
    """What the executor knows of a handle.

    Raises:
        ConfigError: it is none of this Runtime.
    """
    if not isinstance(handle, Handle):
        raise ConfigError(f"handle is a {type(handle).__name__}, not a Handle")
    if handle._runtime_id != runtime_id:
        raise ConfigError("the handle belongs to another Runtime")
    return handle._native


def check_alignment(given: Any, config: RuntimeConfig, *, num_bits: int) -> int:
    """Of a dispatch; None: that of the config."""
    alignment = config.expert_alignment if given is None else given
    if not isinstance(alignment, int) or not 1 <= alignment < 2**num_bits:
        raise ConfigError(f"expert_alignment={alignment!r} is not an integer in 1..2^{num_bits}-1")
    return alignment


def check_capacity(capacity: Any) -> int:
    """Rows of the output; 0 = as many as come."""
    if capacity is None:
        return 0
    if not isinstance(capacity, int) or not 1 <= capacity < 2**31:
        raise ConfigError(f"capacity={capacity!r} is not an integer in 1..2^31-1")
    return capacity


def check_routing(topk_idx: Any, topk_weights: Any, device: Any, num_tokens: int, num_topk: int) -> tuple[Any, Any]:
    """The choices of a fresh dispatch; raises like `check_tensor`."""
    if topk_idx is None:
        raise ConfigError("dispatch needs topk_idx or a handle")
    labels, sizes = ("num_tokens", "num_topk"), (num_tokens, num_topk)
    topk_idx = check_tensor(topk_idx, "topk_idx", device, (torch.int64,), labels, sizes)
    if topk_weights is not None:
        topk_weights = check_tensor(topk_weights, "topk_weights", device, (torch.float32,), labels, sizes)
    return topk_idx, topk_weights


def check_rows(
    x: Any, scales: Any, fp8: str | None, device: Any, config: RuntimeConfig, num_tokens: int | None
) -> tuple[Any, Any, int]:
    """Rows of a dispatch, their scales, and the code of their dtype; raises like `check_tensor`."""
    if fp8 not in CASTS:
        raise ConfigError(f'fp8={fp8!r} is not None, "fp32" or "pow2"')
    x = check_tensor(x, "x", device, _PAYLOADS, ("num_tokens", "hidden"), (num_tokens, config.hidden))
    num_tokens = int(x.shape[0])
    if num_tokens > config.max_tokens:
        raise ConfigError(f"x has {num_tokens} tokens, more than max_tokens={config.max_tokens}")
    code = _PAYLOADS.index(x.dtype)
    is_fp8 = code == 2
    if is_fp8 and fp8 is not None:
        raise ConfigError(f"x is float8_e4m3fn already; fp8={fp8!r} would cast it again")
    if is_fp8 != (scales is not None):
        raise ConfigError(f"x of dtype {x.dtype} comes {'without' if is_fp8 else 'with'} scales")
    if scales is not None:
        labels, sizes = ("num_tokens", "hidden/128"), (num_tokens, num_scales(config.hidden))
        scales = check_tensor(scales, "scales", device, (torch.float32,), labels, sizes)
    row_bytes = config.hidden * (1 if fp8 is not None else ELEMENT_BYTES[code])
    if row_bytes % 16:
        raise ConfigError(f"rows of {row_bytes} bytes are no multiple of 16 bytes, in which the GPU copies")
    return x, scales, code


def _describe(call: CallWords) -> str:
    kind = next((name for name, code in KINDS.items() if code == call.kind), f"operation {call.kind}")
    words = [kind]
    if call.kind <= KINDS["combine"]:
        words.append(f"dtype={DTYPES[call.dtype] if call.dtype < len(DTYPES) else call.dtype}")
    if call.kind in (KINDS["dispatch"], KINDS["cached_dispatch"]):
        words.append(f"cast={('none', 'e4m3', 'e4m3_pow2')[call.cast]}")
        words.append(f"capacity={call.capacity or 'none'}")
    if call.kind == KINDS["dispatch"]:
        layout = next(name for name, code in LAYOUTS.items() if code == call.layout)
        words += [f"layout={layout}", f"expert_alignment={call.alignment}"]
    if call.kind == KINDS["combine"]:
        words.append(f"weight_grads={'yes' if call.has_grads else 'no'}")
    if call.kind in (KINDS["cached_dispatch"], KINDS["combine"]):
        words.append(f"handle={call.handle_epoch}")
    return " ".join(words)


def _reason(header: Any, rank: int, num_topk: int, num_experts: int) -> str:
    """Why a rank's row is not OK."""
    if header.status == _REJECTED:
        return bytes(header.text).rstrip(b"\0").decode(errors="replace") or f"rank {rank} refused its own input"
    token, slot = divmod(header.bad_index, num_topk)
    place = f" at token {token}, slot {slot} on rank {rank}"
    if header.status == 1:
        return f"expert id {header.bad_value}{place} is not -1 or in 0..{num_experts - 1}"
    if header.status == 5:
        return f"rank {rank} calls it with other arguments"
    if header.status == 2:
        return f"expert {header.bad_value} occurs twice{place}"
    weight = struct.unpack("<f", struct.pack("<I", header.bad_value & 0xFFFFFFFF))[0]
    return f"weight {weight}{place} is not finite"


def refusal(result: HostResult, num_ranks: int, num_topk: int, num_experts: int) -> CommError:
    """The error for a verdict other than "go"; the same on every rank."""
    headers = result.headers[:num_ranks]
    reasons = [
        f"rank {rank}: {_reason(header, rank, num_topk, num_experts)}"
        for rank, header in enumerate(headers)
        if header.status
    ]
    if reasons:
        return ConfigError("; ".join(reasons))
    first = bytes(headers[0].call)
    for rank, header in enumerate(headers):
        if bytes(header.call) != first:
            return ConfigError(
                f"ranks disagree about the call: rank 0 calls '{_describe(headers[0].call)}', "
                f"rank {rank} calls '{_describe(header.call)}'"
            )
    short = [
        (rank, needed, header.grant_bytes)
        for rank, (header, needed) in enumerate(zip(headers, result.needed[:num_ranks], strict=True))
        if needed > header.grant_bytes
    ]
    text = "; ".join(
        f"rank {rank} needs {format_bytes(needed)} in one piece, its arena has {format_bytes(room)}"
        for rank, needed, room in short
    )
    return CapacityError(
        f"{text}; drop results that are no longer used or give the Runtime more arena_bytes",
        needed=max(needed for _, needed, _ in short),
        available=min(room for _, _, room in short),
    )


def peer_lost_error(rank: int, peer: int) -> PeerLostError:
    """The error for a rank whose process has ended."""
    return PeerLostError(
        f"rank {peer} is lost: its process has ended; rank {rank} noticed it",
        rank=rank,
        peer=peer,
        channel=f"{peer} -> {rank}",
        phase="process",
    )


def phase_of(note: Any) -> str:
    """Where a kernel waited."""
    return _PHASES.get(note.phase, f"phase {note.phase}")


def fault_error(note: Any, rank: int, timeout_s: float) -> CommError:
    """The error for a fault that this rank or a peer's kernel noted."""
    if note.kind == _PEER_LOST:
        return peer_lost_error(note.rank, note.peer)
    phase = phase_of(note)
    return CommTimeout(
        f"rank {note.rank} waited for rank {note.peer} in {phase} on channel {note.peer} -> {note.rank}, epoch "
        f"{note.epoch}: expected {note.expected}, seen {note.seen}; no progress for {timeout_s:g} s; noticed by rank "
        f"{rank}",
        rank=note.rank,
        peer=note.peer,
        channel=f"{note.peer} -> {note.rank}",
        phase=phase,
        tag=note.epoch,
        expected=note.expected,
        seen=note.seen,
    )


def pack_handle(handle: bytes) -> bytes:
    """For the text of an exchange, which ends at the first zero: in hexadecimal."""
    return handle.hex().encode()


def unpack_handle(text: bytes) -> bytes:
    return bytes.fromhex(text.decode())
