"""`commlib bench`: dispatch and combine against the same work done otherwise, in one run, results checked."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from commlib.errors import ConfigError

__all__ = ["Shape", "add_parser", "ring_options", "run"]

DEFAULT_SHAPES = "1024x1024,4096x1024,1024x7168"
CUDA_SHAPES = "4096x7168"


class Shape(NamedTuple):
    """What one rank dispatches."""

    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("bench", help="dispatch + combine against Alltoallv, memcpy and plain puts (mpirun)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shapes", default=None, help=f"TOKENSxHIDDEN,... per rank (cpu: {DEFAULT_SHAPES}, cuda: {CUDA_SHAPES})"
    )
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--experts", type=int, default=None, help="default 64 (cpu), 256 (cuda)")
    parser.add_argument("--max-nodes", type=int, default=None, help="nodes per token, at most (default: any)")
    parser.add_argument("--iterations", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="executor threads per rank (the baselines have one)")
    parser.add_argument("--chunk-bytes", type=int, default=None, help="bytes per put (default: the Runtime's)")
    parser.add_argument("--ring-bytes", type=int, default=None, help="bytes of a scale-out ring (likewise)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--tune", action="store_true", help="search for the fastest plan, which Runtimes of this shape use from then on"
    )
    parser.add_argument("--json", default=None, help="also append the JSON lines to this file")
    cuda = parser.add_argument_group("with --device cuda")
    cuda.add_argument("--num-sms", type=int, nargs="+", default=[24], help="multiprocessors, one run each")
    cuda.add_argument("--num-local-sms", type=int, default=None, help="multiprocessors for expand and reduce")
    cuda.add_argument("--decode-tokens", type=int, default=128, help="tokens of the latency regime; 0: none")
    cuda.add_argument("--nccl", action="store_true", help="also by torch permutations and NCCL's all-to-all")
    cuda.add_argument("--workload", default="uniform", help="a name of commlib.testing.workloads")
    cuda.add_argument("--routings", type=int, default=3, help="different routings, in turn")
    parser.set_defaults(run=run)


def ring_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """For RuntimeConfig: what the command line says of rings, which no plan replaces then."""
    given = {name: getattr(arguments, name) for name in ("chunk_bytes", "ring_bytes")}
    given = {name: value for name, value in given.items() if value is not None}
    return {**given, "use_tuned_plan": False} if given else {}


def _parse_shapes(arguments: argparse.Namespace) -> list[Shape]:
    is_cuda = arguments.device == "cuda"
    experts = arguments.experts or (256 if is_cuda else 64)
    shapes = []
    for text in (arguments.shapes or (CUDA_SHAPES if is_cuda else DEFAULT_SHAPES)).split(","):
        try:
            tokens, hidden = (int(part) for part in text.split("x"))
        except ValueError:
            raise ConfigError(f"--shapes: {text!r} is not TOKENSxHIDDEN") from None
        shapes.append(Shape(tokens, hidden, arguments.topk, experts))
    return shapes


def run(arguments: argparse.Namespace) -> int:
    # Only what the device needs: GPU hosts may have no native core, CPU hosts no torch.
    if arguments.device == "cuda":
        from commlib.cli.bench_cuda import run as run_device
    else:
        from commlib.cli.bench_cpu import run as run_device
    return run_device(arguments, _parse_shapes(arguments))
