"""The GPU executor against the oracle, bit by bit. Ranks share a GPU where there are fewer GPUs than ranks."""

from __future__ import annotations

from typing import Any

import pytest
from gpu.gpu_ranks import ranks

from commlib.testing.spawn import check_ranks

pytestmark = pytest.mark.gpu

ENV = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1"}


def check(function: str, num_ranks: int, *args: Any, job: str = "gpu.gpu_job", timeout_s: float = 150.0) -> None:
    check_ranks(f"{job}:{function}", num_ranks, args=args, env=ENV, launcher="mpirun", timeout_s=timeout_s)


@pytest.mark.parametrize("num_ranks", ranks(1, 2, 4))
def test_every_workload_is_bitwise_what_the_oracle_says(num_ranks: int) -> None:
    check("plain_rank", num_ranks, [], 256, 37)


def test_wide_rows_go_in_pieces() -> None:
    check("plain_rank", 3, ["masked", "skewed"], 7168, 101)


@pytest.mark.parametrize("num_ranks", ranks(2, 4))
def test_fp8(num_ranks: int) -> None:
    check("fp8_rank", num_ranks, ["masked", "uneven"], 384)


def test_fp8_of_wide_rows() -> None:
    check("fp8_rank", 2, ["uniform"], 7168)


def test_errors() -> None:
    check("errors_rank", 3)


def test_a_rank_that_stays_away() -> None:
    check("timeout_rank", 3)


def test_streams() -> None:
    check("streams_rank", 2)
