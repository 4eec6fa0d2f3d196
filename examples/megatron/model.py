"""A small GPT with MoE layers, built from Megatron-Core's own parts."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Sizes", "build_model"]


@dataclass(frozen=True)
class Sizes:
    """The model. Two experts per token: the sum of two numbers does not depend on their order, so all dispatchers must
    give the same losses to the last bit.
    """

    num_layers: int = 2
    hidden: int = 128
    num_heads: int = 4
    num_experts: int = 8
    expert_hidden: int = 256
    num_topk: int = 2
    seq_len: int = 128
    vocab: int = 256


def build_model(sizes: Sizes, dispatcher: str, num_ranks: int, rank: int) -> Any:
    """GPTModel with experts spread over all ranks.

    Args:
        sizes: of the model.
        dispatcher: "alltoall" or "allgather", which are Megatron's own, or "deepep" or "hybridep": commlib.
        num_ranks, rank: of the job.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    is_flex = dispatcher in ("deepep", "hybridep")
    config = TransformerConfig(
        num_layers=sizes.num_layers,
        hidden_size=sizes.hidden,
        num_attention_heads=sizes.num_heads,
        num_moe_experts=sizes.num_experts,
        ffn_hidden_size=sizes.expert_hidden,
        moe_ffn_hidden_size=sizes.expert_hidden,
        moe_router_topk=sizes.num_topk,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        moe_token_dispatcher_type="flex" if is_flex else dispatcher,
        moe_flex_dispatcher_backend=dispatcher if is_flex else "deepep",
        expert_model_parallel_size=num_ranks,
        use_cpu_initialization=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Fused kernels are for GPUs.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=sizes.num_experts, moe_grouped_gemm=False, normalization=config.normalization
    )
    model = GPTModel(
        config,
        spec,
        vocab_size=sizes.vocab,
        max_sequence_length=sizes.seq_len,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    set_weights(model, sizes, rank)
    return model


def set_weights(model: Any, sizes: Sizes, rank: int) -> None:
    """Every matrix starts from a seed of its name; for experts their rank counts, too."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        owner = f"/{rank}" if is_expert(parameter) else ""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{owner}".encode()))
        with torch.no_grad():
            parameter.normal_(std=sizes.hidden**-0.5, generator=generator)


def is_expert(parameter: Any) -> bool:
    """Whether a parameter exists on this rank only (Megatron marks those that are not to be summed over all ranks)."""
    return not getattr(parameter, "allreduce", True)
