"""What one rank does wrong, all ranks hear of: same exception, same text, same call. *_rank run on every rank."""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from moe_job import HIDDEN, assert_bits, free_ports, open_runtime, part_of_job, small_config
from torch import Tensor

from commlib.bootstrap import Bootstrap
from commlib.errors import CapacityError, CommError, ConfigError
from commlib.handle import Dispatched
from commlib.runtime import Runtime
from commlib.testing.payloads import identity_payload
from commlib.testing.spawn import check_ranks
from commlib.topology import Topology

pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem
NODES = (0, 0, 1)
NUM_TOKENS = 5
CULPRIT = 1  # neither rank 0 nor a rail of its own


def raised(group: Bootstrap, call: Callable[[], object], kind: type[CommError], pattern: str) -> CommError:
    """The error of `call`, which must be the same on all ranks: exactly this type, these values, this text."""
    try:
        result = call()
        error: Exception | None = None
    except Exception as caught:
        error = caught
    told = [type(error).__name__, str(error), {} if error is None else dict(error.__dict__)]
    everybody = [json.loads(each) for each in group.allgather(json.dumps(told).encode(), timeout_s=60)]
    assert error is not None, f"{pattern}: no error but {result!r}; everybody: {everybody}"
    assert type(error) is kind, f"{pattern}: {everybody}"
    assert all(each == everybody[0] for each in everybody), f"{pattern}: {everybody}"
    assert re.search(pattern, str(error)), f"{pattern!r} is not in {str(error)!r}"
    return error


class Inputs(NamedTuple):
    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor


def good(rank: int) -> Inputs:
    x = identity_payload(rank, NUM_TOKENS, HIDDEN, torch.float32)
    idx = torch.stack([(torch.arange(NUM_TOKENS) + rank + 4 * k) % 12 for k in range(3)], dim=1)
    return Inputs(x, idx, torch.full((NUM_TOKENS, 3), 0.5))


def check_usable(runtime: Runtime) -> Dispatched:
    """All is as if nothing had happened: three experts on three ranks give every token back three times."""
    x, idx, weights = good(runtime.rank)
    got = runtime.dispatch(x, idx, weights)
    assert_bits(runtime.combine(got.x, got.handle).x, 3 * x, "after an error")
    return got


def put(array: Tensor, place: tuple[int, int], value: float) -> Tensor:
    changed = array.clone()
    changed[place] = value
    return changed


def bad_dispatches(mine: Inputs, handle: Any, foreign: Any) -> list[tuple[dict[str, Any], str]]:
    """Changes of the good call (topk_idx=... and so on) and what the error says about each."""
    x, idx, weights = mine
    q, scales = x.to(torch.float8_e4m3fn), torch.ones(NUM_TOKENS, HIDDEN // 128)
    by_handle = {"topk_idx": None, "topk_weights": None}
    return [
        ({"x": x.double()}, "x has dtype float64, not float32 or bfloat16 or float8_e4m3fn"),
        ({"x": x[:, :-1]}, rf"x has shape \[5, {HIDDEN - 1}\], not \[num_tokens, hidden={HIDDEN}\]"),
        ({"x": x[0]}, rf"x has shape \[{HIDDEN}\], not"),
        ({"x": x.tolist()}, "x is a list, not a torch tensor or numpy array"),
        ({"x": x.to("meta")}, "x is on device meta"),
        ({"topk_idx": None}, "dispatch needs topk_idx or a handle"),
        ({"topk_idx": idx.int()}, "topk_idx has dtype int32, not int64"),
        ({"topk_idx": idx[:, :2]}, r"topk_idx has shape \[5, 2\], not \[5, num_topk=3\]"),
        ({"topk_idx": idx[:4]}, r"topk_idx has shape \[4, 3\], not \[5, num_topk=3\]"),
        ({"topk_idx": put(idx, (3, 1), 12)}, r"expert id 12 at token 3, slot 1 on rank 1 is not -1 or in 0\.\.11"),
        ({"topk_idx": put(idx, (4, 2), -2)}, "expert id -2 at token 4, slot 2 on rank 1"),
        ({"topk_idx": put(idx, (0, 0), 2**40)}, "expert id 1099511627776 at token 0, slot 0"),
        ({"topk_idx": put(idx, (2, 2), int(idx[2, 0]))}, "expert 3 occurs twice at token 2, slot 2 on rank 1"),
        ({"topk_weights": weights.double()}, "topk_weights has dtype float64, not float32"),
        ({"topk_weights": weights[:, :1]}, r"topk_weights has shape \[5, 1\]"),
        ({"topk_weights": put(weights, (1, 2), torch.nan)}, "weight -?nan at token 1, slot 2 on rank 1 is not finite"),
        ({"topk_weights": put(weights, (4, 0), -torch.inf)}, "weight -inf at token 4, slot 0 on rank 1 is not finite"),
        ({"layout": "columns"}, 'layout=\'columns\' is not "grouped" or "rows"'),
        ({"layout": []}, r"layout=\[\] is not"),
        ({"expert_alignment": 0}, r"expert_alignment=0 is not an integer in 1\.\.2\^31-1"),
        ({"expert_alignment": 1.5}, r"expert_alignment=1\.5 is not an integer"),
        ({"fp8": "int8"}, 'fp8=\'int8\' is not None, "fp32" or "pow2"'),
        ({"fp8": ["fp32"]}, r"fp8=\['fp32'\] is not None"),
        ({"x": q, "scales": scales, "fp8": "fp32"}, "x is float8_e4m3fn already; fp8='fp32' would cast it again"),
        ({"x": q}, "x of dtype float8_e4m3fn comes without scales"),
        ({"scales": scales}, "x of dtype float32 comes with scales"),
        ({"x": q, "scales": scales[:, :1]}, r"scales has shape \[5, 1\], not \[5, 2\]"),
        ({"x": q, "scales": scales.half()}, "scales has dtype float16, not float32"),
        ({"handle": handle}, "dispatch by handle takes no topk_idx and no topk_weights"),
        ({"handle": handle, "x": x[:3], **by_handle}, r"x has shape \[3, 256\], not \[5, hidden=256\]"),
        ({"handle": foreign, **by_handle}, "the handle belongs to another Runtime"),
        ({"handle": "a handle", **by_handle}, "handle is a str, not a Handle"),
    ]


def check_dispatches(group: Bootstrap, runtime: Runtime, foreign: Any) -> None:
    mine = good(runtime.rank)
    handle = check_usable(runtime).handle
    for number, (change, pattern) in enumerate(bad_dispatches(mine, handle, foreign)):
        values = {**mine._asdict(), **(change if runtime.rank == CULPRIT else {})}

        def call(values: dict[str, Any] = values) -> object:
            return runtime.dispatch(**values)

        raised(group, call, ConfigError, rf"^rank {CULPRIT}: {pattern}")
        if number % 5 == 0:
            check_usable(runtime)
    check_usable(runtime)
    # Masked slots are not read: their weights may be anything.
    masked = put(mine.topk_idx, (0, 1), -1), put(mine.topk_weights, (0, 1), torch.nan)
    runtime.dispatch(mine.x, *masked)


def check_combines(group: Bootstrap, runtime: Runtime, foreign: Any) -> None:
    rank = runtime.rank
    for layout in ("grouped", "rows"):
        x, idx, weights = good(rank)
        got = runtime.dispatch(x, idx, weights, layout=layout, expert_alignment=1)
        y, rows = got.x, got.handle.num_rows
        wrong_grads = torch.zeros(rows, 3) if layout == "grouped" else torch.zeros(rows)
        bad: list[tuple[dict[str, Any], str]] = [
            ({"y": y.double()}, "y has dtype float64, not float32 or bfloat16"),
            ({"y": y.to(torch.float8_e4m3fn)}, "y has dtype float8_e4m3fn, not float32 or bfloat16"),
            ({"y": y[1:]}, rf"y has shape \[{rows - 1}, 256\], not \[num_rows={rows}, hidden=256\]"),
            ({"y": None}, "y is a NoneType, not a torch tensor or numpy array"),
            ({"weights": torch.zeros(rows + 1)}, rf"weights has shape \[{rows + 1}\], not \[num_rows={rows}\]"),
            ({"weights": torch.zeros(rows, dtype=torch.bfloat16)}, "weights has dtype bfloat16, not float32"),
            ({"weight_grads": wrong_grads}, r"weight_grads has shape \["),
            ({"handle": None}, "handle is a NoneType, not a Handle"),
            ({"handle": foreign}, "the handle belongs to another Runtime"),
        ]
        for change, pattern in bad:
            # Ranks differ in their number of rows; the message is about the culprit's.
            known = group.allgather(pattern.encode(), timeout_s=60)[CULPRIT].decode()
            values = {"y": y, "handle": got.handle, **(change if rank == CULPRIT else {})}

            def call(values: dict[str, Any] = values) -> object:
                return runtime.combine(**values)

            raised(group, call, ConfigError, rf"^rank {CULPRIT}: {known}")
        assert_bits(runtime.combine(y, got.handle).x, 3 * x, f"{layout}, after the errors")


def check_two_culprits(group: Bootstrap, runtime: Runtime) -> None:
    x, idx, weights = good(runtime.rank)
    if runtime.rank:
        idx = put(idx, (runtime.rank, 0), 11 + runtime.rank)
    pattern = "^rank 1: expert id 12 at token 1, slot 0 on rank 1 .*; rank 2: expert id 13 at token 2, slot 0 on rank 2"
    raised(group, lambda: runtime.dispatch(x, idx, weights), ConfigError, pattern)
    check_usable(runtime)


def check_disagreements(group: Bootstrap, runtime: Runtime) -> None:
    x, idx, weights = good(runtime.rank)
    first, second = check_usable(runtime), check_usable(runtime)
    y = first.x
    grads = torch.zeros(first.handle.num_rows)
    plain: Callable[[], object] = lambda: runtime.dispatch(x, idx, weights)  # noqa: E731
    back: Callable[[], object] = lambda: runtime.combine(y, first.handle)  # noqa: E731
    pairs: list[tuple[Callable[[], object], Callable[[], object], str]] = [
        (plain, back, "'dispatch .*', rank 1 calls 'combine dtype=float32"),
        (plain, runtime.barrier, "'dispatch .*', rank 1 calls 'barrier'"),
        (plain, lambda: runtime.dispatch(x, handle=first.handle), "'dispatch .*', rank 1 calls 'cached_dispatch"),
        (plain, lambda: runtime.dispatch(x, idx, weights, layout="rows"), "layout=grouped .*layout=rows"),
        (plain, lambda: runtime.dispatch(x, idx, weights, expert_alignment=16), "alignment=8'.*alignment=16'"),
        (plain, lambda: runtime.dispatch(x.bfloat16(), idx, weights), "dtype=float32 .*dtype=bfloat16 "),
        (plain, lambda: runtime.dispatch(x, idx, weights, fp8="fp32"), "cast=none .*cast=e4m3 "),
        (
            lambda: runtime.dispatch(x, idx, weights, fp8="pow2"),
            lambda: runtime.dispatch(x, idx, weights, fp8="fp32"),
            "cast=e4m3_pow2 .*cast=e4m3 ",
        ),
        (back, lambda: runtime.combine(y, second.handle), r"handle=\d+', rank 1 calls .*handle=\d+'"),
        (back, lambda: runtime.combine(y.bfloat16(), first.handle), "dtype=float32 .*dtype=bfloat16 "),
        (back, lambda: runtime.combine(y, first.handle, weight_grads=grads), "weight_grads=no .*weight_grads=yes"),
    ]
    for ours, theirs, pattern in pairs:
        call = theirs if runtime.rank == CULPRIT else ours
        raised(group, call, ConfigError, f"^ranks disagree about the call: rank 0 calls .*{pattern}")
        check_usable(runtime)


def check_capacity(group: Bootstrap) -> None:
    """All tokens go to rank 2, whose arena may not grow that far; less fits."""
    with open_runtime(group, NODES, arena_bytes=4096, max_arena_bytes=1 << 20) as runtime:
        x = torch.ones(400, HIDDEN)
        idx = torch.tensor([[8, 9, 10]]).expand(400, 3).contiguous()
        pattern = r"^rank 2: the arena would need \d+ MiB, more than max_arena_bytes = 1 MiB; .* raise max_arena_bytes"
        error = raised(group, lambda: runtime.dispatch(x, idx), CapacityError, pattern)
        assert isinstance(error, CapacityError)
        # 3 experts of 1200 FP32 rows: that many bytes at least, and the next power of two at most.
        assert 3600 * HIDDEN * 4 <= error.needed < 2 * 3600 * HIDDEN * 4 and 0 <= error.available <= 1 << 20
        got = check_usable(runtime)
        # The rows are there, the landing of a combine with them is not: rank 0 sends many, to itself.
        rows = 300 if runtime.rank == 0 else 0
        got = runtime.dispatch(torch.ones(rows, HIDDEN), idx[:rows] - 8)
        pattern = r"^rank 0: the arena would need 2 MiB, more than max_arena_bytes = 1 MiB"
        y, handle = got.x, got.handle
        raised(group, lambda: runtime.combine(y, handle), CapacityError, pattern)
        check_usable(runtime)


def errors_rank(port: int) -> None:
    group = part_of_job(port, int(os.environ["COMMLIB_RANK"]), 3)
    with open_runtime(group, NODES) as other, open_runtime(group, NODES) as runtime:
        foreign = check_usable(other).handle
        check_dispatches(group, runtime, foreign)
        check_combines(group, runtime, foreign)
        check_two_culprits(group, runtime)
        check_disagreements(group, runtime)
        check_usable(other)
    check_capacity(group)
    group.close()


def test_bad_calls_raise_on_every_rank() -> None:
    check_ranks(f"{HERE}:errors_rank", 3, args=free_ports(1), timeout_s=150)


# --- construction -------------------------------------------------------------------------------------------------


def bad_constructions() -> list[tuple[dict[str, Any], str]]:
    """What rank 1 passes to Runtime instead, and the error of all."""
    fine = small_config()
    here, there = Topology(NODES), Topology((0, 1, 1))
    agree = "^ranks must agree, but rank 1 has {0}, rank 0 has {1}$"
    return [
        ({"config": replace(fine, hidden=512)}, agree.format("hidden=512", "hidden=256")),
        ({"config": replace(fine, num_topk=4)}, agree.format("num_topk=4", "num_topk=3")),
        ({"config": replace(fine, num_experts=24)}, agree.format("num_experts=24", "num_experts=12")),
        ({"config": replace(fine, ring_bytes=16384)}, agree.format("ring_bytes=16384", "ring_bytes=8192")),
        (
            {"config": replace(fine, hidden=128, num_topk=2)},
            "^ranks must agree, but rank 1 has hidden=128, rank 0 has hidden=256; rank 1 has num_topk=2, rank 0 has",
        ),
        ({"topology": there}, r"rank 1 has topology=\[0, 1, 1\], rank 0 has topology=\[0, 0, 1\]$"),
        ({"topology": None}, r"rank 1 has topology=found out, rank 0 has topology=\[0, 0, 1\]$"),
        ({"topology": Topology((0, 0))}, "^rank 1: topology has 2 ranks, the group has 3$"),
        (
            {"config": replace(fine, num_experts=13)},
            "^rank 1: num_experts=13 is not divisible by num_ranks=3$",
        ),
        # The same on all ranks, found by the native core.
        ({"config": replace(fine, transport="pigeon"), "topology": here}, "pigeon"),
    ]


def check_address_space(group: Bootstrap) -> None:
    """One rank's address space is too small for max_arena_bytes: all raise what it raises."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if group.rank == CULPRIT:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 30), limits[1]))
    pattern = r"^rank 1: mapping 6553\d MiB of address space failed: .*; lower max_arena_bytes or raise ulimit -v$"
    call = partial(open_runtime, group, NODES, max_arena_bytes=64 << 30)
    error = raised(group, call, CapacityError, pattern)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert isinstance(error, CapacityError) and error.needed >= 64 << 30 and error.available == 0


def construction_rank(port: int) -> None:
    rank = int(os.environ["COMMLIB_RANK"])
    group = part_of_job(port, rank, 3)
    for change, pattern in bad_constructions():
        is_mine = rank == CULPRIT or "pigeon" in pattern
        values = {"config": small_config(), "topology": Topology(NODES), **(change if is_mine else {})}

        def call(values: dict[str, Any] = values) -> object:
            return Runtime(group, **values)

        raised(group, call, ConfigError, pattern)
    check_address_space(group)
    # What concerns a rank alone may differ.
    own = {"num_threads": rank + 1, "arena_bytes": 4096 << rank, "timeout_s": 10.0 + rank, "heartbeat_timeout_s": 5.0}
    with open_runtime(group, NODES, **own) as runtime:
        check_usable(runtime)
    group.close()


def test_constructions_that_differ_raise_on_every_rank() -> None:
    check_ranks(f"{HERE}:construction_rank", 3, args=free_ports(1), timeout_s=100)
