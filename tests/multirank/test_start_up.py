"""What a process hears when it opens a Runtime: what is missing, and the log that it asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import commlib

pytestmark = pytest.mark.multirank

CONFIG = commlib.RuntimeConfig(hidden=128, num_experts=2, num_topk=2, max_tokens=8)


def test_a_device_that_is_not_there_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:3", torch.device("cuda", 3)):
        with pytest.raises(commlib.ConfigError, match=r"'cuda(:3)?' is not there: torch .* finds 0 CUDA devices"):
            commlib.Runtime(None, CONFIG, device=device)


def start_up_lines(*, has_own_handler: bool, **environ: str) -> str:
    """What a process that opens a Runtime writes to stderr."""
    own = "logging.basicConfig(format='own %(message)s')" if has_own_handler else ""
    config = "RuntimeConfig(hidden=128, num_experts=2, num_topk=2, max_tokens=8)"
    program = f"import logging, commlib; {own}\ncommlib.Runtime(None, commlib.{config}).close()"
    cleaned = {name: value for name, value in os.environ.items() if not name.startswith("COMMLIB_")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=cleaned | environ, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stderr


def test_the_log_says_what_was_asked_for() -> None:
    assert start_up_lines(has_own_handler=False) == ""
    assert start_up_lines(has_own_handler=False, COMMLIB_LOG="warning") == ""
    text = start_up_lines(has_own_handler=False, COMMLIB_LOG="info")
    assert "INFO commlib: rank 0: commlib rank 0 of 1" in text and "INFO commlib.bootstrap: bootstrap: single" in text
    text = start_up_lines(has_own_handler=True, COMMLIB_LOG="info")
    assert text.count("commlib rank 0 of 1") == 1 and "own rank 0: commlib rank 0 of 1" in text
