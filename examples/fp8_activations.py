"""How much memory an MoE layer holds from its forward to its backward pass, with rows kept in BF16 and in FP8.

    python -m examples.fp8_activations
    mpirun -n 4 python -m examples.fp8_activations --device cuda --tokens 4096 --hidden 7168 --width 2048 --experts 32

Counted is the MoE part: what dispatch delivers, what the routed experts keep, what combine keeps; not the weights, not
the shared expert. On GPUs also the peak of the allocator over forward and backward, plus the slabs that rows lie in;
the gradient of one weight is part of it, so `--experts` should be what a GPU of a large job holds times the ranks.
BF16 is the layer of `examples/moe_layer.py`, whose autograd graph keeps both inputs of SwiGLU and what follows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import commlib
from commlib import ops, overlap, routing
from examples.moe_layer import MoELayer

GOAL = 1.8


def main() -> None:
    """Print both and their ratio on every rank; stop if it is below the goal."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, default in (("tokens", 512), ("hidden", 512), ("width", 256), ("experts", 8), ("topk", 4), ("layers", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    config = commlib.RuntimeConfig(
        hidden=arguments.hidden,
        num_experts=arguments.experts,
        num_topk=arguments.topk,
        max_tokens=arguments.tokens,
        expert_alignment=128,
    )
    with commlib.Runtime(None, config, device=arguments.device) as runtime:
        kept, peak = zip(*(measure(runtime, arguments, is_fp8=is_fp8) for is_fp8 in (False, True)), strict=True)
        where = f"rank {runtime.rank} of {runtime.num_ranks}"
        print(f"{where}: kept {_mib(kept[0])} in BF16, {_mib(kept[1])} in FP8: {kept[0] / kept[1]:.2f}x less")
        if arguments.device == "cuda":
            print(f"{where}: peak {_mib(peak[0])} in BF16, {_mib(peak[1])} in FP8: {peak[0] / peak[1]:.2f}x less")
        plain, fp8 = peak if arguments.device == "cuda" else kept
        if plain < GOAL * fp8:
            raise SystemExit(f"{where}: {plain / fp8:.2f}x is below {GOAL}x")


def measure(runtime: commlib.Runtime, arguments: argparse.Namespace, *, is_fp8: bool) -> tuple[int, int]:
    """Bytes that the MoE part of all layers keeps after the forward pass; peak of both passes, 0 on CPUs.

    On GPUs of the second time: the gradients of weights are there by then.
    """
    gate = routing.GateConfig(num_experts=arguments.experts, num_topk=arguments.topk, score_function="sigmoid")
    torch.manual_seed(0)
    with torch.device(arguments.device):
        layers = [
            MoELayer(arguments.hidden, arguments.width, 1, gate, runtime, is_fp8=is_fp8)
            for _ in range(arguments.layers)
        ]
    found = [measure_once(runtime, arguments, layers) for _ in range(2 if arguments.device == "cuda" else 1)]
    return found[-1]


def measure_once(runtime: commlib.Runtime, arguments: argparse.Namespace, layers: list[MoELayer]) -> tuple[int, int]:
    """`measure`, one forward and backward pass."""
    x = torch.randn(arguments.tokens, arguments.hidden).to(arguments.device, torch.bfloat16).requires_grad_()
    attended = [layer.attention(x) for layer in layers]
    storages = {each.untyped_storage().data_ptr() for layer in layers for each in layer.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    is_cuda = arguments.device == "cuda"
    grad = torch.randn_like(x)
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if is_cuda else 0
    slabs = []

    def note_slabs(_grad: Tensor) -> None:
        slabs.append(runtime.memory().arena_used_bytes)

    outs = []
    for layer, each in zip(layers, attended, strict=True):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outs.append(moe_part(layer, each, note_slabs))
    total = sum(kept.values())
    torch.autograd.backward(outs, [grad] * len(outs))
    return total, torch.cuda.max_memory_allocated() - before + max(slabs) if is_cuda else 0


def moe_part(layer: MoELayer, attended: overlap.Attended, on_grad: Callable[[Tensor], None]) -> Tensor:
    """Dispatch, routed experts, combine: what `overlap.run_layer` does between attention and the end.

    `on_grad` is called when the gradients of the experts' outputs have come: then the Runtime holds most.
    """
    how = layer.exchange
    received = ops.dispatch(
        how.runtime, attended.x, attended.topk_idx, attended.topk_weights, fp8=how.fp8, keep_fp8=how.keep_fp8
    )
    y = layer.mlp(received)
    y.register_hook(on_grad)
    return ops.combine(how.runtime, y, received.handle, grad_fp8=how.grad_fp8)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
