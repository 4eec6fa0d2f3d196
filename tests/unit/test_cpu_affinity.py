"""CPUs near a GPU, as the kernel tells them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from commlib.cuda.affinity import cpus_near, parse_cpu_list


@pytest.mark.parametrize(
    ("text", "cpus"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("\n", set()), ("0,2-3,64-65", {0, 2, 3, 64, 65})]
)
def test_cpu_lists(text: str, cpus: set[int]) -> None:
    assert parse_cpu_list(text) == cpus


def test_only_cpus_that_the_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = min(os.sched_getaffinity(0))
    device = SimpleNamespace(pci_bus_id="0000:1A:00.0")
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(Device=lambda index: device)))
    assert cpus_near("cuda:0", tmp_path) == []  # the kernel says nothing
    folder = tmp_path / "0000:1a:00.0"
    folder.mkdir()
    (folder / "local_cpulist").write_text(f"{mine},4000-4003\n")
    assert cpus_near("cuda:0", tmp_path) == [mine]
