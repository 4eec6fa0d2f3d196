"""What one training run is made of. The defaults train in a few minutes on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass

from commlib import routing
from commlib.layout import SCALE_BLOCK

VOCAB = 256  # bytes


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the model. Nothing here depends on the number of ranks: 1 and 4 ranks train the same model.

    Attributes:
        hidden: width of the residual stream.
        num_layers: blocks of the trunk; the first `num_dense_layers` have a dense feed-forward layer.
        dense_width: inner width of the dense feed-forward layers.
        num_heads: attention heads.
        q_rank, kv_rank: widths of the compressed queries and of the compressed keys and values.
        nope_dim, rope_dim: per head, the part of queries and keys without and with rotary position.
        v_dim: per head, width of the values.
        bf16_attention: attention's dot products take the compute dtype, too, which is what GPUs have fast kernels for.
        num_experts, num_topk: routed experts over all ranks, and how many of them a token takes.
        num_groups, max_groups: expert groups, and from how many of them one token may choose ("node-limited"). Make
            `num_groups` the number of nodes of the machine you train for.
        num_shared: shared experts.
        expert_width: inner width of one expert.
        route_scale: factor on the routing weights.
        fp8_experts: rows travel to the routed experts in FP8, as do gradients; their matmuls take FP8, and they keep
            nothing else for the backward pass. `hidden` and `expert_width` are multiples of 128 then. What experts
            return travels in the compute dtype.
    """

    hidden: int = 128
    num_layers: int = 3
    num_dense_layers: int = 1
    dense_width: int = 384
    num_heads: int = 4
    q_rank: int = 64
    kv_rank: int = 32
    nope_dim: int = 16
    rope_dim: int = 16
    v_dim: int = 32
    bf16_attention: bool = False
    num_experts: int = 16
    num_topk: int = 4
    num_groups: int = 4
    max_groups: int = 2
    num_shared: int = 1
    expert_width: int = 96
    route_scale: float = 1.0
    fp8_experts: bool = False

    def __post_init__(self) -> None:
        if self.fp8_experts and (self.hidden % SCALE_BLOCK or self.expert_width % SCALE_BLOCK):
            raise ValueError(
                f"hidden={self.hidden}, expert_width={self.expert_width}: FP8 experts want multiples of {SCALE_BLOCK}"
            )
        if not 0 <= self.num_dense_layers < self.num_layers:
            raise ValueError(
                f"num_dense_layers={self.num_dense_layers} is not in 0..num_layers-1={self.num_layers - 1}"
            )

    @property
    def num_moe_layers(self) -> int:
        """MoE layers, the one in the multi-token-prediction module included."""
        return self.num_layers - self.num_dense_layers + 1

    @property
    def expert_alignment(self) -> int:
        """Rows of an expert come in multiples of this: what grouped matmuls want, or FP8's tiles of 128 rows."""
        return SCALE_BLOCK if self.fp8_experts else 32

    @property
    def gate(self) -> routing.GateConfig:
        """The sigmoid gate of every MoE layer."""
        return routing.GateConfig(
            num_experts=self.num_experts,
            num_topk=self.num_topk,
            score_function="sigmoid",
            num_groups=self.num_groups,
            max_groups=self.max_groups,
            normalize=True,
            route_scale=self.route_scale,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the model is trained.

    Attributes:
        steps, warmup_steps: optimizer steps in all, and those over which the learning rate rises linearly.
        global_batch: sequences per step over all ranks.
        seq_len: predicted bytes per sequence.
        lr, final_lr: peak learning rate, and where the cosine ends.
        beta1, beta2, weight_decay, clip_norm: AdamW and the global gradient norm it is fed with.
        bias_rate: step of the gate bias per optimizer step. 0.001 suits a run of 10^5 steps and more; one of a few
            hundred steps has to move the bias faster to cover the same distance.
        balance_alpha: factor of the sequence-wise balance loss.
        mtp_lambda: factor of the multi-token-prediction loss.
        ema_decay: of the averaged weights, per step; 0: none are kept.
        seed: of the initial weights and of the data order.
        draw_on_device: initial weights are drawn on the GPU: other numbers than on CPUs, which take minutes for 10^9.
    """

    steps: int = 240
    warmup_steps: int = 20
    global_batch: int = 32
    seq_len: int = 128
    lr: float = 3e-3
    final_lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    bias_rate: float = 0.01
    balance_alpha: float = 1e-4
    mtp_lambda: float = 0.3
    ema_decay: float = 0.98
    seed: int = 1
    draw_on_device: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} is below 1")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the work. Changes no result but by the order of floating-point sums.

    Attributes:
        ep_ranks: ranks that share the experts; groups of so many ranks repeat each other. 0: all ranks.
        shard_dense: the large dense parameters are sharded over the `ep_ranks` ranks of a group by FSDP2 (HSDP).
        micro_batches: parts into which each rank's share of the batch is cut.
        overlap: "none"; "batches": two micro-batches in flight within each layer; "pairs": each micro-batch's forward
            pass beside the backward pass of the one before. The gradients are the same, bit for bit.
        exchange: "commlib"; "torch": permutations and all-to-all of torch.distributed in its place, for comparison.
        num_sms: multiprocessors of a GPU that commlib's kernels take.
    """

    ep_ranks: int = 0
    shard_dense: bool = False
    micro_batches: int = 1
    overlap: str = "none"
    exchange: str = "commlib"
    num_sms: int = 24

    def __post_init__(self) -> None:
        if self.overlap not in ("none", "batches", "pairs"):
            raise ValueError(f"overlap={self.overlap!r} is not none, batches or pairs")
        if self.exchange not in ("commlib", "torch") or (self.exchange == "torch" and self.overlap != "none"):
            raise ValueError(f"exchange={self.exchange!r} is not commlib, or torch with overlap=none")
        if self.micro_batches < 1 or (self.overlap == "batches" and self.micro_batches % 2):
            raise ValueError(
                f"micro_batches={self.micro_batches} with overlap={self.overlap}: at least 1, for batches even"
            )
