"""The kernels of casts, compiled for this CPU: indices, tails and results, without a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_checks import check_e5m6, close_rows, close_sums, make, same, same_rows

from commlib import quant
from commlib.cuda import quant as fused

NATIVE = Path(__file__).resolve().parents[2] / "native"
EMULATION = NATIVE / "tests" / "cuda_on_cpu"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    # The folder of the emulation comes first: its cuda/e4m3.cuh takes the place of the real one.
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", f"-I{EMULATION}", f"-I{NATIVE}"]
    command = ["g++", *options, "-o", str(path), str(EMULATION / "quant_kernels.cc"), "-pthread"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


@pytest.fixture(params=[1, 3])
def on_cpu(request: pytest.FixtureRequest, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches go to the library, with so many blocks at most and few threads where the kernel takes any number."""

    def launch(name: str, call: Any, device: Any, blocks: int, threads: int, num_sms: int | None) -> None:
        run: Callable[..., None] = getattr(library, f"run_{name}")
        if blocks:
            run(ctypes.byref(call), min(blocks, request.param), threads if threads == fused._TILE_THREADS else 64)

    monkeypatch.setattr(fused, "_launch", launch)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(dtype: torch.dtype) -> None:
    for rows, columns in ((0, 128), (1, 128), (37, 384), (40, 128)):
        x = make(rows, columns, dtype, rows, is_odd=True)
        same_rows(fused.cast_rows(x), quant.cast_rows(x), f"{rows} x {columns}")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pow2", [False, True])
def test_weights(dtype: torch.dtype, pow2: bool) -> None:
    for shape in ((128, 256), (3, 128, 256), (2, 256, 384), (2, 136, 200), (1, 8, 8), (0, 128, 128)):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        if w.numel() > 1000:
            w.view(-1)[11], w.view(-1)[700] = float("nan"), 300.0
        results = fused.quantize_weight(w, pow2=pow2), quant.quantize_weight(w, pow2=pow2)
        for ours, theirs in zip(*results, strict=True):
            same(ours, theirs, str(shape))
        results = fused.quantize_weight(w.mT, pow2=pow2), quant.quantize_weight(w.mT, pow2=pow2)
        for ours, theirs in zip(*results, strict=True):
            same(ours, theirs, f"{shape}, rows and columns exchanged")
            assert ours.is_contiguous()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("pow2", [False, True])
def test_columns(pow2: bool) -> None:
    for rows, hidden in ((0, 256), (128, 128), (256, 384)):
        given = quant.quantize_e4m3(make(rows, hidden, torch.bfloat16, rows), pow2=pow2)
        for turned in (False, True):
            results = [each.retile_columns(*given, pow2=pow2, turned=turned) for each in (fused, quant)]
            for ours, theirs in zip(*results, strict=True):
                same(ours, theirs, f"{rows} x {hidden}, {turned=}")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype) -> None:
    for rows, width in ((0, 128), (1, 384), (37, 256)):
        generator = torch.Generator().manual_seed(rows + width)
        gate, up, grad = (torch.randn(rows, width, generator=generator).mul(3).to(dtype) for _ in range(3))
        weights = torch.rand(rows, generator=generator)
        ours, theirs = fused.swiglu_cast(gate, up, weights), quant.swiglu_cast(gate, up, weights)
        same_rows(ours.gate, theirs.gate, "gate")
        same_rows(ours.up, theirs.up, "up")
        close_rows(ours.inner, theirs.inner, "inner")
        again = quant.swiglu_again(theirs.gate, theirs.up, weights)
        close_rows(fused.swiglu_again(ours.gate, ours.up, weights), again, "again")
        back = fused.swiglu_backward(grad, ours.gate, ours.up, weights)
        expected = quant.swiglu_backward(grad, theirs.gate, theirs.up, weights)
        close_rows(back.gate, expected.gate, "gradient of gate")
        close_rows(back.up, expected.up, "gradient of up")
        inputs = theirs.gate.dequantize().double() * theirs.up.dequantize().double()
        close_sums(back.row_weights, expected.row_weights, grad.double() * inputs)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_e5m6(dtype: torch.dtype) -> None:
    check_e5m6(fused, dtype, "cpu", ((0, 128), (1, 128), (40, 384)))
