"""Likewise of the kernels for several nodes; started by launch/dev gpu-test as plain processes."""

from __future__ import annotations

from gpu.gpu_tiers_job import SMALL, fp8_rank, plain_rank

if __name__ == "__main__":
    plain_rank(["masked"], 256, 21, SMALL)
    fp8_rank(["masked"], 256)
