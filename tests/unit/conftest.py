"""Kernels on this CPU, for all files that run them."""

from __future__ import annotations

import pytest
from engines_on_cpu import replace_cuda
from kernels_on_cpu import CpuKernels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> CpuKernels:
    """Compiled once, when they are first asked for."""
    return CpuKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """See `replace_cuda`."""
    replace_cuda(monkeypatch)
