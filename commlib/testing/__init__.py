"""Inputs for tests and benchmarks: routings (`workloads`) and rows (`payloads`) that depend on their arguments only."""
