"""First contact: send tokens to their experts, double them there, bring them home.

python examples/dispatch_combine.py
mpirun -n 4 python examples/dispatch_combine.py
"""

import torch

import commlib
from commlib import ops

TOKENS, HIDDEN, EXPERTS, TOPK = 16, 64, 8, 2


def main() -> None:
    """Check on every rank that combine returns what the experts made of this rank's tokens."""
    config = commlib.RuntimeConfig(
        hidden=HIDDEN, num_experts=EXPERTS, num_topk=TOPK, max_tokens=TOKENS, expert_alignment=1
    )
    with commlib.Runtime(None, config) as rt:
        torch.manual_seed(rt.rank)
        x = torch.randint(-8, 8, (TOKENS, HIDDEN)).float()  # small integers: every sum below is exact
        topk_idx = torch.rand(TOKENS, EXPERTS).topk(TOPK).indices
        topk_weights = torch.full((TOKENS, TOPK), 1.0 / TOPK)

        received = ops.dispatch(rt, x, topk_idx, topk_weights, layout="grouped")
        y = 2 * received.x * received.row_weights[:, None]  # every expert doubles its rows
        out = ops.combine(rt, y, received.handle)

        assert torch.equal(out, 2 * x), "combine did not return the doubled tokens"
        print(f"rank {rt.rank} of {rt.num_ranks}: rows per local expert {received.num_tokens_per_expert}, all correct")


if __name__ == "__main__":
    main()
