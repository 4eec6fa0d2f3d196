"""Low-latency mode, `ElasticBuffer` and `HybridEPBuffer`: what vLLM, SGLang, torchtitan, DeepSpeed and Megatron-Core
rely on.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from commlib.testing.spawn import check_ranks

pytestmark = pytest.mark.multirank


def check(target: str, num_ranks: int, tmp_path: Path, ranks_per_node: int | None = None) -> None:
    check_ranks(target, num_ranks, args=[str(tmp_path / "store")], ranks_per_node=ranks_per_node)


@pytest.mark.parametrize("job", ["low_latency_job", "elastic_job", "hybrid_job"])
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(2, None), (4, 2)])
def test_dispatch_and_combine(job: str, num_ranks: int, ranks_per_node: int | None, tmp_path: Path) -> None:
    check(f"{job}:plain_rank", num_ranks, tmp_path, ranks_per_node)


@pytest.mark.parametrize("function", ["hooks_rank", "formats_rank", "masks_rank"])
def test_low_latency(function: str, tmp_path: Path) -> None:
    check(f"low_latency_job:{function}", 2, tmp_path)


@pytest.mark.parametrize("function", ["worst_rank", "options_rank"])
def test_elastic(function: str, tmp_path: Path) -> None:
    check(f"elastic_job:{function}", 2, tmp_path)


@pytest.mark.parametrize("function", ["uneven_maps_rank", "limit_rank", "formats_rank"])
def test_hybrid(function: str, tmp_path: Path) -> None:
    check(f"hybrid_job:{function}", 2, tmp_path)
