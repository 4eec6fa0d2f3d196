"""DualPipe over four ranks, DualPipeV over two ranks with experts on two, and torch's schedule, bit by bit."""

from __future__ import annotations

import pytest
from moe_job import free_ports

from commlib.testing.spawn import check_ranks

pytestmark = pytest.mark.multirank


def test_pipelines_give_the_gradients_of_plain_order() -> None:
    check_ranks("pipeline_job:pipeline_rank", 4, args=free_ports(1), timeout_s=150)


def test_transfers_do_not_need_tags_nor_another_order() -> None:
    check_ranks("pipeline_job:in_order_rank", 4, args=free_ports(1), timeout_s=120)


def test_failed_steps_leave_nothing_behind() -> None:
    check_ranks("pipeline_job:failing_rank", 1, args=free_ports(1), timeout_s=90)


def test_a_step_that_fails_between_transfers_is_the_last() -> None:
    check_ranks("pipeline_job:failing_pair_rank", 2, args=free_ports(1), timeout_s=90)
