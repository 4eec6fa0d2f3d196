"""Megatron-Core from PyPI on commlib: `moe_token_dispatcher_type="flex"` gives what its own dispatchers give."""

from __future__ import annotations

from pathlib import Path

import pytest

from commlib.testing.spawn import Launcher, check_ranks

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize(
    ("num_ranks", "functions"), [(2, ["layer_rank", "pipeline_rank"]), (4, ["layer_rank", "tensor_parallel_rank"])]
)
def test_moe_layer(num_ranks: int, functions: list[str], tmp_path: Path) -> None:
    args = [str(tmp_path / "store"), "cpu", *(f"megatron_job:{function}" for function in functions)]
    check_ranks("compat.compat_job:several", num_ranks, args=args)


@pytest.mark.parametrize(("launcher", "dispatcher"), [("mpirun", "deepep"), ("torchrun", "hybridep")])
def test_example(launcher: Launcher, dispatcher: str) -> None:
    results = check_ranks(
        "compat.megatron_job:example_rank", 2, args=["--steps", "3", "--dispatcher", dispatcher], launcher=launcher
    )
    assert f"PASS: 3 losses on commlib ({dispatcher}) and with alltoall differ by at most 0;" in results[0].stdout
