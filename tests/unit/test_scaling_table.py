"""The tables of tests/perf/scaling.py."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

SCALING = runpy.run_path(str(Path(__file__).resolve().parents[1] / "perf" / "scaling.py"))

SHAPE = {"num_tokens": 4096, "hidden": 7168, "num_topk": 8, "num_experts": 256}


def line(what: str, num_ranks: int = 4, **values: Any) -> dict[str, Any]:
    return {"what": what, **values, **SHAPE, "num_ranks": num_ranks, "workload": "uniform", "sms": 16, "device": "GPU"}


def test_figures_find_their_columns() -> None:
    grouped = {"layout": "grouped", "dtype": "bf16"}
    lines = [
        line("push_limit", way="all", us=90.0, gb_s=300.0),
        line("dispatch", us=200.0, gb_s=143.36, of_push_limit=0.5, **grouped),
        line("dispatch", us=100.0, gb_s=143.36, of_push_limit=0.5, layout="rows", dtype="bf16"),
        line("dispatch", us=150.0, gb_s=70.0, of_push_limit=0.3, layout="grouped", dtype="fp8"),
        line("combine", us=250.0, gb_s=120.0, of_push_limit=0.4, **grouped),
        line("nccl dispatch", us=500.0, gb_s=50.0, **grouped),
        line("nccl combine", us=1000.0, gb_s=50.0, **grouped),
        line("host dispatch", us=70.0),
        line("memory", registered_bytes=3 << 20),
        line("dispatch", num_ranks=2, us=180.0, gb_s=0.0, of_push_limit=None, **grouped),
    ]
    rows = SCALING["tables"](lines).splitlines()
    assert rows[0] == "GPU, uniform, 4096 tokens per rank"
    assert rows[-2] == "| 2 | 16 | 180 | - | - | - | - | - | - | - | - | - | - |"
    assert rows[-1] == "| 4 | 16 | 200 | 100.0 | 0.5 | 2.50 | 250 | 0.4 | 4.00 | 150 | 70 | - | 3.0 |"
    assert rows[2].count("|") == rows[-1].count("|")
