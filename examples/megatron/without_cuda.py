"""Lets Megatron-Core 0.16 run on CPU tensors in a process without CUDA. Nothing in Megatron's files is changed.

Megatron names `torch.cuda` in a few places whatever the device of its tensors is: to create weights "on the current
device", to wait on streams. `torch.cpu` has the same names for the CPU, and they go in the place of the others. And
it leaves split sizes that are on the CPU already as tensors, which `all_to_all_single` does not take.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo.config
import torch.distributed as dist

__all__ = ["define_transformer_engine_names", "use_cpu_in_place_of_cuda"]


class _Stream(torch.cpu.Stream):
    """torch's CPU stream, whose `record_event` also returns an event. Everything on it is over at once."""

    def record_event(self, event: Any = None) -> Any:
        return torch.cpu.Event() if event is None else event

    def synchronize(self) -> None:
        pass


_all_to_all_single = dist.all_to_all_single


def _all_to_all_with_lists(
    output: Any, input: Any, output_splits: Any = None, input_splits: Any = None, **kw: Any
) -> Any:
    splits = {f"{key}_split_sizes": kw.pop(f"{key}_split_sizes", None) for key in ("output", "input")}
    for key, given in (("output", output_splits), ("input", input_splits)):
        sizes = given if given is not None else splits[f"{key}_split_sizes"]
        splits[f"{key}_split_sizes"] = sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
    return _all_to_all_single(output, input, **splits, **kw)


def use_cpu_in_place_of_cuda() -> None:
    """Call it before megatron.core is imported, in a process that does not use CUDA.

    Raises:
        RuntimeError: the process uses CUDA.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError("this process uses CUDA")
    torch.cuda.Stream = _Stream
    torch.cuda.current_stream = lambda device=None: _Stream()
    for name in ("Event", "current_device", "stream", "synchronize"):
        setattr(torch.cuda, name, getattr(torch.cpu, name))
    # Megatron compiles small functions; without a GPU that only costs time.
    torch._dynamo.config.disable = True
    dist.all_to_all_single = _all_to_all_with_lists
    define_transformer_engine_names()


def define_transformer_engine_names() -> None:
    """Without Transformer Engine, on any device: Megatron's router asks whether a name is None that is not defined."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
