"""DualPipe over four ranks, DualPipeV over two ranks with experts on two, and torch's schedule, bit by bit."""

from __future__ import annotations

import pytest
from moe_job import free_ports

from commlib.testing.spawn import check_ranks

pytestmark = pytest.mark.multirank


def test_pipelines_give_the_gradients_of_plain_order() -> None:
    check_ranks("pipeline_job:pipeline_rank", 4, args=free_ports(1), timeout_s=150)
