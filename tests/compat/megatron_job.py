"""Megatron-Core's MoELayer with its flex dispatcher on commlib, against its own dispatchers.

Functions named *_rank run on every rank. Nothing of Megatron is changed; without CUDA, `torch.cuda` is stood in for.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch._dynamo.config
import torch.distributed as dist
from compat.compat_job import Job, joined
from torch import Tensor

from examples.megatron.without_cuda import define_transformer_engine_names, use_cpu_in_place_of_cuda

HIDDEN = 64
NUM_EXPERTS = 8
NUM_TOPK = 3
BACKENDS = ("deepep", "hybridep")

# What is set besides the dispatcher. Capacity limits drop tokens, and give experts tokens that did not choose them.
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"params_dtype": torch.bfloat16, "bf16": True},
    "capacity": {"moe_expert_capacity_factor": 0.6},
    "padded": {"moe_expert_capacity_factor": 1.2, "moe_pad_expert_input_to_capacity": True},
}


@contextmanager
def megatron(job: Job, expert_tensor_parallel: int) -> Iterator[None]:
    """Megatron's process groups: experts over all ranks, each expert cut in `expert_tensor_parallel` parts."""
    warnings.simplefilter("ignore")
    if job.device.type == "cpu":
        use_cpu_in_place_of_cuda()
    else:
        torch._dynamo.config.disable = True  # Megatron compiles small functions: minutes for nothing
        define_transformer_engine_names()
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=job.size // expert_tensor_parallel,
        expert_tensor_parallel_size=expert_tensor_parallel,
    )
    yield
    from megatron.core.transformer.moe.fused_a2a import reset_hybrid_ep_buffer

    reset_hybrid_ep_buffer()  # a global of the client, for one group for ever
    parallel_state.destroy_model_parallel()


def make_layers(job: Job, count: int, expert_tensor_parallel: int, **settings: Any) -> list[Any]:
    """MoE layers with weights that depend on the layer, the parameter and, for experts, the rank only."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_config import TransformerConfig

    values: dict[str, Any] = {
        "num_layers": count,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_moe_experts": NUM_EXPERTS,
        "ffn_hidden_size": 96,
        "moe_ffn_hidden_size": 96,
        "moe_router_topk": NUM_TOPK,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": job.size // expert_tensor_parallel,
        "expert_tensor_parallel_size": expert_tensor_parallel,
        "use_cpu_initialization": job.device.type == "cpu",
        "perform_initialization": job.device.type == "cpu",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "bias_activation_fusion": False,
    }
    config = TransformerConfig(**{**values, **settings})
    spec = get_gpt_layer_local_spec(num_experts=NUM_EXPERTS, moe_grouped_gemm=config.moe_grouped_gemm)
    submodules = spec.submodules.mlp.submodules
    layers = [MoELayer(config, submodules, layer_number=number + 1).to(job.device) for number in range(count)]
    for number, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            owner = job.rank + 1 if "experts" in name else 0
            generator = torch.Generator(parameter.device)
            generator.manual_seed(10007 * number + 1009 * owner + sum(name.encode()))
            with torch.no_grad():
                parameter.normal_(std=0.8 * config.hidden_size**-0.5, generator=generator)
    return layers


@dataclass
class Outcome:
    """Results of one run, and the largest value that was added up into an output or an input's gradient."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    largest_output_term: float = 0.0
    largest_gradient_term: float = 0.0


def run(
    job: Job, layers: Sequence[Any], num_tokens: int, dtype: torch.dtype, *, num_batches: int = 1, in_flight: int = 1
) -> Outcome:
    """Forward and backward passes of all batches; a backward pass comes `in_flight` - 1 forward passes later."""
    result = Outcome()

    def watch(module: Any, inputs: Any, outputs: Any) -> None:
        result.largest_output_term = max(result.largest_output_term, largest(outputs[0]))
        if inputs[0].requires_grad:
            inputs[0].register_hook(watch_gradient)

    def watch_gradient(gradient: Tensor) -> None:
        result.largest_gradient_term = max(result.largest_gradient_term, largest(gradient))

    hooks = [layer.experts.register_forward_hook(watch) for layer in layers]
    waiting: list[tuple[int, Tensor, Tensor, Tensor]] = []
    for batch in range(num_batches + in_flight - 1):
        if batch < num_batches:
            generator = torch.Generator().manual_seed(1000 * batch + job.rank)
            x = torch.randn(num_tokens, 2, HIDDEN, generator=generator).to(job.device, dtype).requires_grad_()
            factor = torch.randn(x.shape, generator=generator).to(job.device, dtype)
            y = x
            for layer in layers:
                y = layer(y)[0]
            waiting.append((batch, x, y, factor))
        if batch >= in_flight - 1:
            number, x, y, factor = waiting.pop(0)
            (y * factor).sum().backward()
            result.tensors[f"output {number}"] = y.detach()
            result.tensors[f"gradient {number}"] = x.grad
    for hook in hooks:
        hook.remove()
    for number, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.any()), f"layer {number}: {name} has no gradient"
            result.tensors[f"layer {number}: {name}"] = parameter.grad
    return result


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0


def over_ranks(job: Job, value: float) -> float:
    most = torch.tensor([value], device=job.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def check(job: Job, expected: Outcome, actual: Outcome, what: str, num_terms: int = NUM_TOPK) -> None:
    """Every weight's gradient, the router's included, bit by bit; sums over experts up to their rounding.

    Both sides add up the same terms t_1..t_n of a token in another order, with at most n + 1 roundings of partial sums
    that sum |t| bounds: so they differ by at most 2 (n + 1) (eps / 2) sum |t|. For an output, n = K = `num_terms` and
    sum |t| <= K max |t|. For an input's gradient there is one term more, the router's r = dx - sum t, hence n = K + 1
    and sum |t| <= 2 K max |t| + |dx|.
    """
    outputs = over_ranks(job, expected.largest_output_term)
    gradients = over_ranks(job, expected.largest_gradient_term)
    for name, wanted in expected.tensors.items():
        got = actual.tensors[name]
        eps = torch.finfo(wanted.dtype).eps
        if name.startswith("output"):
            tolerance = (num_terms + 1) * eps * num_terms * outputs
        elif name.startswith("gradient"):
            tolerance = (num_terms + 2) * eps * (2 * num_terms * gradients + largest(wanted))
        else:
            tolerance = 0.0
        worst = largest(got.float() - wanted.float())
        assert worst <= tolerance, f"{what}: {name} is off by {worst:.3g}, allowed {tolerance:.3g}"
        assert bool(wanted.any()) and got.dtype == wanted.dtype, f"{what}: {name}"


def layer_rank(store: str, device: str = "cpu") -> None:
    """One layer of each variant against the alltoall dispatcher, with as many tokens on every rank, and with others."""
    with joined(store, device) as job, megatron(job, 1):
        for backend, (variant, settings) in product(BACKENDS, VARIANTS.items()):
            if variant == "padded" and backend == "deepep":
                continue  # Megatron has no such combination: its top-k would drop the tokens that padding adds
            dtype = settings.get("params_dtype", torch.float32)
            uneven = 0 if variant == "padded" else 3 * job.rank
            runs = []
            for dispatcher in ("alltoall", "flex"):
                layers = make_layers(
                    job,
                    1,
                    1,
                    moe_token_dispatcher_type=dispatcher,
                    moe_flex_dispatcher_backend=backend,
                    **settings,
                )
                runs.append(run(job, layers, 9 + uneven, dtype))
            check(job, *runs, f"{backend}, {variant}")


def pipeline_rank(store: str, device: str = "cpu") -> None:
    """Two layers, three batches: with all of them in flight the results are those of one after another, bit by bit."""
    if device != "cpu":  # Megatron adds up a token's rows with atomics otherwise
        torch.use_deterministic_algorithms(True, warn_only=True)
    with joined(store, device) as job, megatron(job, 1):
        for backend in BACKENDS:
            settings = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
            runs = [
                run(job, make_layers(job, 2, 1, **settings), 7, torch.float32, num_batches=3, in_flight=in_flight)
                for in_flight in (1, 3)
            ]
            for name, wanted in runs[0].tensors.items():
                assert torch.equal(runs[1].tensors[name], wanted), f"{backend}: {name} depends on what is in flight"


def tensor_parallel_rank(store: str, device: str = "cpu") -> None:
    """Experts cut in two: groups of TP x EP ranks, in which a token goes to both halves of each expert."""
    with joined(store, device) as job, megatron(job, 2):
        expected = run(job, make_layers(job, 1, 2, moe_token_dispatcher_type="allgather"), 9, torch.float32)
        for backend in BACKENDS:
            settings = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": backend}
            actual = run(job, make_layers(job, 1, 2, **settings), 9, torch.float32)
            check(job, expected, actual, f"{backend}, expert tensor parallel", num_terms=2 * NUM_TOPK)


def example_rank(*arguments: str) -> None:
    """examples/megatron, which says by its exit status whether its losses are those of the reference."""
    from examples.megatron.__main__ import main

    sys.argv = ["examples.megatron", *arguments]
    sys.exit(main())
