"""The CUDA kernels compile without a GPU and spill nothing; the host-side arithmetic of their launches and memory."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from commlib.config import RuntimeConfig
from commlib.cuda import compile as cuda_compile
from commlib.cuda import params
from commlib.cuda.compile import UNITS, compile_unit, resources
from commlib.cuda.launch import (
    MAX_SHARED_BYTES,
    Tuning,
    plan_combine,
    plan_dispatch,
    plan_packets,
    plan_tier_combine,
)
from commlib.cuda.limits import check_limits
from commlib.cuda.memory import ALIGNMENT, Heap, Regions
from commlib.errors import ConfigError
from commlib.topology import Topology
from examples.overlap_figures import occupied

KERNELS = {
    "exchange": {"exchange"},
    "dispatch": {"dispatch"},
    "combine_bf16": {"combine_bf16"},
    "combine_f32": {"combine_f32"},
    "tier_dispatch": {"tier_dispatch"},
    "tier_combine_bf16": {"tier_combine_bf16"},
    "tier_combine_f32": {"tier_combine_f32"},
    "latency_dispatch": {"latency_dispatch"},
    "latency_combine": {"latency_combine"},
    "gate": {"gate_8", "gate_16", "gate_32"},
    "dispatch_layout": {"dispatch_layout"},
    "quant": {"cast_rows", "cast_weight", "retile_columns"},
    "e5m6": {"cast_e5m6", "uncast_e5m6"},
    "swiglu": {"swiglu_cast", "swiglu_again", "swiglu_backward"},
    "push_limit": {"push_limit"},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


@pytest.mark.parametrize("unit", UNITS)
def test_kernels_stay_in_registers(unit: str, cache: Path) -> None:
    cubin, log = compile_unit(unit, cache)
    assert cubin.startswith(b"\x7fELF")
    found = resources(log)
    assert {each.kernel for each in found} == KERNELS[unit]
    assert [each for each in found if each.stack_bytes or each.spill_bytes] == []
    # A second call gives the same bytes, from the disk.
    assert compile_unit(unit, cache) == (cubin, log)
    assert len(list(cache.glob(f"{unit}-*.cubin"))) == 1


def test_spills_are_seen() -> None:
    """The report of a kernel that is given too few registers."""
    source = """
extern "C" __global__ void __launch_bounds__(1024, 2) hungry(float* x) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[threadIdx.x + i * 1024];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) x[threadIdx.x * 96 + (i * 7) % 96] = v[i] * v[95 - i];
}
"""
    options = [option for option in cuda_compile._options() if "include" not in option]
    _, log = cuda_compile.nvrtc.compile_cubin(source, "hungry.cu", options)
    (found,) = resources(log)
    assert found.kernel == "hungry" and found.spill_bytes > 0 and found.stack_bytes > 0


def test_the_example_s_own_kernel_compiles() -> None:
    """It goes through CuPy on a GPU, which compiles it in the same way."""
    options = [f"--gpu-architecture={cuda_compile.ARCHITECTURE}"]
    cubin, _ = cuda_compile.nvrtc.compile_cubin(occupied.SOURCE, "occupy.cu", options)
    assert b"occupy" in cubin


def test_a_struct_that_differs_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    class Landing(ctypes.Structure):
        _fields_ = [("num_records", ctypes.c_uint64), ("num_rows", ctypes.c_uint64)]

    monkeypatch.setattr(params, "_MIRRORS", (Landing,))
    with pytest.raises(ConfigError, match="static assertion failed"):
        compile_unit("push_limit")


def test_unknown_unit() -> None:
    with pytest.raises(
        ConfigError,
        match=re.escape(
            "unit='nothing' is not one of exchange|dispatch|combine_bf16|combine_f32|tier_dispatch|"
            "tier_combine_bf16|tier_combine_f32|latency_dispatch|latency_combine|gate|dispatch_layout|quant|e5m6|swiglu|push_limit"
        ),
    ):
        compile_unit("nothing")


@pytest.mark.parametrize("hidden", [128, 200, 2048, 7168, 16384])
@pytest.mark.parametrize("element", [1, 2, 4])
def test_launches_fit(hidden: int, element: int) -> None:
    tuning = Tuning()
    launches = []
    if hidden * element % 16 == 0:
        launches += [plan_dispatch(hidden * element, tuning), plan_combine(hidden * element, tuning)]
    if hidden % 128 == 0 and element > 1:
        cast = plan_dispatch(hidden * element, tuning, cast_element_bytes=element)
        assert cast.piece_bytes % (128 * element) == 0
        launches.append(cast)
    if hidden * element % 16 == 0 and element > 1:
        launches.append(plan_tier_combine(hidden * element, element, tuning))
        assert launches[-1].warps <= 12  # __launch_bounds__ in native/cuda/tier_combine_bf16.cu
    for launch in launches:
        assert 0 < launch.shared_bytes <= MAX_SHARED_BYTES
        assert launch.piece_bytes % 16 == 0 and 32 * launch.warps <= 512


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="rows of 200 bytes are no multiple of 16 bytes"):
        plan_dispatch(200, Tuning())
    with pytest.raises(ConfigError, match="leaves no shared memory for rows of 65536 bytes"):
        plan_dispatch(65536, Tuning(dispatch_warps=300))


@pytest.mark.parametrize("hidden", [8, 200, 512, 1000, 2048, 7168, 16384])
@pytest.mark.parametrize("is_cast", [False, True])
@pytest.mark.parametrize("room", [MAX_SHARED_BYTES, 50_000])
def test_packets_hold_every_part(hidden: int, is_cast: bool, room: int) -> None:
    if is_cast and hidden % 128:
        return
    row_bytes = 2 * hidden
    cut = plan_packets(row_bytes, room, is_cast=is_cast)
    parts = -(-row_bytes // cut.piece_bytes)
    columns = cut.piece_bytes // 2
    payload = columns + columns // 128 * 4 if is_cast else cut.piece_bytes
    assert cut.part_bytes // 16 * 12 >= payload and cut.slot_bytes == parts * cut.part_bytes
    assert cut.piece_bytes % (256 if is_cast else 16) == 0 and (parts - 1) * cut.piece_bytes < row_bytes
    # What is cast in place makes room for its scales behind it.
    assert (not is_cast or payload <= cut.piece_bytes) and cut.shared_bytes <= room


def test_limits_of_the_latency_regime() -> None:
    def check(ranks: int, **options: int) -> None:
        config = RuntimeConfig(**{"hidden": 7168, "num_experts": 256, "num_topk": 8, "decode_tokens": 128, **options})
        check_limits(config, Topology((0,) * ranks), ranks)

    for ranks in (1, 2, 4, 8, 32):
        check(ranks)
    check(8, decode_tokens=1024)
    with pytest.raises(ConfigError, match="choices travel in 12 bits, for up to 4094 experts"):
        check(1, num_experts=4096)
    with pytest.raises(ConfigError, match="rows of 14336 bytes find 0 bytes of shared memory beside the choices"):
        check(32, decode_tokens=512)
    with pytest.raises(ConfigError, match="rows of 131072 bytes are too wide for the latency regime"):
        check(2, hidden=65536)


def test_heap_takes_splits_and_merges() -> None:
    heap = Heap(512, 10 * ALIGNMENT)
    first, second = heap.take(1), heap.take(ALIGNMENT + 1)
    assert (first.offset, second.offset) == (0, ALIGNMENT)
    assert (first.address, second.address) == (512, 512 + ALIGNMENT)
    assert heap.used_bytes == 3 * ALIGNMENT
    del first
    rest = heap.take_largest()
    assert rest.num_bytes == 7 * ALIGNMENT and heap.take(ALIGNMENT * 2).num_bytes == ALIGNMENT
    front = rest.split_front(100)
    assert (front.num_bytes, rest.num_bytes) == (ALIGNMENT, 6 * ALIGNMENT)
    del rest, second
    assert heap.used_bytes == ALIGNMENT
    del front
    assert heap.used_bytes == 0 and heap.take_largest().num_bytes == 10 * ALIGNMENT
    assert Heap(0, 0).take_largest().num_bytes == 0


@pytest.mark.parametrize("what", ["used_bytes", "largest_bytes"])
def test_the_last_slab_goes_back_while_somebody_counts(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a garbage collection on the same thread, which must not wait for the lock that this thread holds."""
    heap, freed = Heap(512, 10 * ALIGNMENT), []
    slabs = [heap.take(ALIGNMENT)]
    heap.when_unused(lambda: freed.append(True))
    merge = heap._merge

    def collect() -> None:
        merge()
        slabs.clear()

    monkeypatch.setattr(heap, "_merge", collect)
    getattr(heap, what)
    assert freed == [True] and heap.used_bytes == 0 and freed == [True]


def test_regions_do_not_overlap() -> None:
    config = RuntimeConfig(hidden=256, num_experts=12, num_topk=3, max_tokens=100)
    regions = Regions(config, 4)
    offsets = sorted(regions.offsets.values())
    assert offsets[0] == 0 and len(set(offsets)) == len(offsets) and all(o % ALIGNMENT == 0 for o in offsets)
    assert regions.offsets["combine_arrived"] - regions.offsets["dispatch_arrived"] >= 4 * 4 * 100
    assert regions.total_bytes - regions.offsets["combine_arrived"] >= 4 * 4 * 100
    several = Regions(config, 4, num_nodes=2, max_local_ranks=2)
    assert several.exchange_row_bytes >= regions.exchange_row_bytes
    assert several.offsets["home_arrived"] - several.offsets["partial_arrived"] >= 4 * 4 * 2 * 100
    assert several.total_bytes - several.offsets["home_arrived"] >= 4 * 2 * 100
