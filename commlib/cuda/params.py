"""The structs that host and kernels share, as ctypes: mirrors of native/cuda/params.cuh.

`layout_checks` turns them into assertions that every compilation of a kernel checks.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_uint32, c_uint64, sizeof

from commlib.cuda.quant_params import (
    CastE5m6Call,
    CastRowsCall,
    CastWeightCall,
    RetileCall,
    SwigluAgainCall,
    SwigluBackwardCall,
    SwigluCall,
    UncastE5m6Call,
)

__all__ = [
    "MAX_RANKS",
    "MAX_TOPK",
    "TEXT_BYTES",
    "WORKSPACE_BYTES",
    "CallWords",
    "CombineCall",
    "DispatchCall",
    "ExchangeCall",
    "ExchangeHeader",
    "FaultNote",
    "GateCall",
    "HostResult",
    "Landing",
    "LatencyCombineCall",
    "LatencyDispatchCall",
    "LatencyRegions",
    "LayoutCall",
    "Mesh",
    "PushLimitCall",
    "Tables",
    "TierCall",
    "Workspace",
    "layout_checks",
    "sizeof",
]

MAX_RANKS = 32
MAX_TOPK = 32
TEXT_BYTES = 160
_POINTER = c_uint64  # a device address

# Room for the Workspace of native/cuda/params.cuh.
WORKSPACE_BYTES = 4096


class FaultNote(ctypes.Structure):
    _fields_ = [
        ("kind", c_uint32),
        ("phase", c_uint32),
        ("rank", c_int32),
        ("peer", c_int32),
        ("epoch", c_uint64),
        ("expected", c_uint64),
        ("seen", c_uint64),
    ]


class CallWords(ctypes.Structure):
    _fields_ = [
        (name, c_uint32)
        for name in ("kind", "dtype", "cast", "layout", "alignment", "has_grads", "handle_epoch", "capacity")
    ]


class ExchangeHeader(ctypes.Structure):
    _fields_ = [
        ("epoch", c_uint64),
        ("grant_offset", c_uint64),
        ("grant_bytes", c_uint64),
        ("status", c_uint32),
        ("bad_index", c_uint32),
        ("bad_value", c_int64),
        ("call", CallWords),
        ("text", ctypes.c_char * TEXT_BYTES),
    ]


class Landing(ctypes.Structure):
    _fields_ = [
        (name, c_uint64)
        for name in (
            "num_rows",
            "num_records",
            "rows",
            "scales",
            "weights",
            "topk_idx",
            "output_bytes",
            "records",
            "total_bytes",
        )
    ]


class HostResult(ctypes.Structure):
    _fields_ = [
        ("ticket", c_uint64),
        ("verdict", c_uint32),
        ("reserved", c_uint32),
        ("landing", Landing),
        ("needed", c_uint64 * MAX_RANKS),
        ("headers", ExchangeHeader * MAX_RANKS),
    ]


class Tables(ctypes.Structure):
    _fields_ = [
        (name, _POINTER)
        for name in ("rank_counts", "num_rows", "rows_per_expert", "expert_offset", "node_counts", "state")
    ]


class Workspace(ctypes.Structure):
    """The head of it; the plan that follows is the kernels' own business."""

    _fields_ = [
        *((name, c_uint64) for name in ("epoch", "input_error")),
        *(
            (name, c_uint32)
            for name in (
                "blocks_done",
                "next_push",
                "next_expand",
                "next_reduce",
                "next_final",
                "is_faulty",
                "overflowed",
                "next_own",
            )
        ),
        ("settled", c_uint64),
    ]


class Mesh(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_int32)
            for name in ("rank", "num_ranks", "num_experts", "num_topk", "max_tokens", "experts_per_rank")
        ),
        *(
            (name, c_uint64)
            for name in (
                "timeout_ns",
                "fault_word",
                "fault_note",
                "exchange_epoch",
                "exchange_row",
                "exchange_row_bytes",
                "dispatch_arrived",
                "combine_arrived",
                "partial_arrived",
                "home_arrived",
            )
        ),
        ("fabric", _POINTER),
        ("board", _POINTER),
        ("stop", _POINTER),
        ("workspace", _POINTER),
        ("base", _POINTER * MAX_RANKS),
        ("heap", _POINTER * MAX_RANKS),
    ]


class ExchangeCall(ctypes.Structure):
    _fields_ = [
        *(
            (name, _POINTER)
            for name in ("topk_idx", "topk_weights", "slots", "block_base", "node_masks", "result", "refused")
        ),
        ("tables", Tables),
        *(
            (name, c_uint64)
            for name in ("grant_offset", "grant_bytes", "row_bytes", "scales_bytes", "slot_bytes", "ticket")
        ),
        *((name, c_uint32) for name in ("num_tokens", "tokens_per_block", "count_blocks", "status")),
        ("call", CallWords),
        ("text", ctypes.c_char * TEXT_BYTES),
    ]


class DispatchCall(ctypes.Structure):
    _fields_ = [
        *(
            (name, _POINTER)
            for name in ("x", "scales", "topk_idx", "topk_weights", "slots", "block_base", "records", "routes")
        ),
        ("tables", Tables),
        *(
            (name, c_uint32)
            for name in (
                "num_tokens",
                "tokens_per_block",
                "in_row_bytes",
                "row_bytes",
                "num_scales",
                "piece_bytes",
                "push_warps",
                "push_blocks",
                "layout",
                "alignment",
                "cast",
                "dtype",
                "capacity",
            )
        ),
    ]


class CombineCall(ctypes.Structure):
    _fields_ = [
        *(
            (name, _POINTER)
            for name in ("y", "weights", "weight_grads", "out", "out_weight_grads", "records", "routes")
        ),
        *(
            (name, c_uint32)
            for name in ("num_tokens", "piece_bytes", "slot_bytes", "row_bytes", "layout", "final_warps")
        ),
    ]


class TierCall(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("node_masks", "node_counts", "slot_tokens", "token_slots", "forward_records")),
        *(
            (name, c_uint32)
            for name in (
                "num_tokens",
                "out_blocks",
                "most_in_blocks",
                "in_per_copy",
                "slot_bytes",
                "scales_offset",
                "record_offset",
                "is_fresh",
            )
        ),
    ]


class LatencyRegions(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_uint64)
            for name in (
                "slots",
                "messages",
                "partials",
                "partial_epoch",
                "dispatch_done",
                "combine_done",
                "block_epochs",
            )
        ),
        *(
            (name, c_uint32)
            for name in (
                "max_tokens",
                "slot_bytes",
                "weights_offset",
                "partial_bytes",
                "message_bytes",
            )
        ),
    ]


class LatencyDispatchCall(ctypes.Structure):
    _fields_ = [
        *(
            (name, _POINTER)
            for name in (
                "x",
                "topk_idx",
                "topk_weights",
                "refused",
                "rows",
                "scales",
                "weights",
                "records",
                "owners",
                "rows_per_expert",
                "expert_offset",
                "state",
            )
        ),
        ("ticket", c_uint64),
        *(
            (name, c_uint32)
            for name in (
                "num_tokens",
                "in_row_bytes",
                "row_bytes",
                "num_scales",
                "piece_bytes",
                "part_bytes",
                "alignment",
                "cast",
                "dtype",
                "capacity",
                "agreed",
                "status",
                "phases",
                "shared_offset",
            )
        ),
    ]


class LatencyCombineCall(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("y", "weights", "out", "records", "owners", "state")),
        *((name, c_uint32) for name in ("num_tokens", "row_bytes", "piece_bytes", "part_bytes", "phases")),
    ]


class GateCall(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("logits", "bias", "group_of_expert", "topk_idx", "topk_weights", "scores")),
        *(
            (name, c_uint32)
            for name in (
                "num_tokens",
                "num_experts",
                "num_topk",
                "num_groups",
                "max_groups",
                "num_summed",
                "lanes_per_group",
                "dtype",
                "is_softmax",
                "normalize",
            )
        ),
        ("route_scale", ctypes.c_float),
    ]


class LayoutCall(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("topk_idx", "tokens_per_rank", "tokens_per_expert", "is_token_in_rank")),
        *((name, c_uint32) for name in ("num_tokens", "num_topk", "num_experts", "num_ranks")),
    ]


class PushLimitCall(ctypes.Structure):
    _fields_ = [
        ("rows", _POINTER),
        ("landing", _POINTER * MAX_RANKS),
        *((name, c_uint32) for name in ("num_peers", "num_rows", "row_bytes", "piece_bytes")),
    ]


_MIRRORS = (
    FaultNote, CallWords, ExchangeHeader, Landing, HostResult, Tables, Mesh, ExchangeCall, DispatchCall, CombineCall,
    TierCall,
)  # fmt: skip


# Structs that only some units have.
_MIRRORS_OF = {
    "latency_dispatch": (LatencyRegions, LatencyDispatchCall),
    "latency_combine": (LatencyRegions, LatencyCombineCall),
    "push_limit": (PushLimitCall,),
    "gate": (GateCall,),
    "dispatch_layout": (LayoutCall,),
    "e5m6": (CastE5m6Call, UncastE5m6Call),
    "quant": (CastRowsCall, CastWeightCall, RetileCall),
    "swiglu": (SwigluCall, SwigluAgainCall, SwigluBackwardCall),
}


def layout_checks(unit: str) -> str:
    """C++ assertions that the structs a unit of native/cuda sees lie in memory as the ones here do."""
    # What offsetof expands to in this compiler. NVRTC has not that header and, before 13.1, no built-in either.
    lines = ["namespace commlib::cuda {", f"static_assert(sizeof(Workspace) <= {WORKSPACE_BYTES});"]
    for mirror in (*_MIRRORS, *_MIRRORS_OF.get(unit, ()), Workspace):
        name = mirror.__name__
        if mirror is not Workspace:
            lines.append(f"static_assert(sizeof({name}) == {sizeof(mirror)});")
        for field in mirror._fields_:
            offset = getattr(mirror, field[0]).offset
            lines.append(f"static_assert(__INTADDR__(&(({name}*)0)->{field[0]}) == {offset});")
    return "\n".join([*lines, "}  // namespace commlib::cuda", ""])
