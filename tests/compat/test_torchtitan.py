"""torchtitan's client files for DeepEP V1 (0.2.2) and V2 (0.3.0) on commlib."""

from __future__ import annotations

from pathlib import Path

import pytest

from commlib.testing.spawn import check_ranks

pytestmark = pytest.mark.multirank


@pytest.mark.parametrize("function", ["first_version_rank", "second_version_rank"])
def test_client(function: str, tmp_path: Path) -> None:
    check_ranks(f"compat.torchtitan_job:{function}", 2, args=[str(tmp_path / "store")])
