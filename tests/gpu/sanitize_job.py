"""A small run of every kernel for compute-sanitizer; started by launch/dev gpu-test, on every rank."""

from __future__ import annotations

from gpu.gpu_job import fp8_rank, plain_rank
from gpu.gpu_modes_job import capacity_rank, latency_rank

if __name__ == "__main__":
    plain_rank(["masked"], 256, 21)
    fp8_rank(["masked"], 256)
    capacity_rank()
    latency_rank()
