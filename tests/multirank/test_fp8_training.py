"""An MoE layer with routed experts in FP8: what it keeps, its numbers, its schedules. *_rank run on every rank."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import overlap_job as job
import pytest
import torch
from moe_job import free_ports, part_of_job, small_config, wait_for
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from commlib import ops, overlap, routing
from commlib.quant import Fp8Rows, quantize_e4m3
from commlib.runtime import Runtime
from commlib.testing.payloads import random_payload
from commlib.testing.spawn import check_ranks
from commlib.topology import Topology
from examples.moe_layer import MoELayer

pytestmark = pytest.mark.multirank

HERE = Path(__file__).stem
HIDDEN, WIDTH, NUM_TOKENS = 256, 128, 96
GATE = routing.GateConfig(num_experts=8, num_topk=2, score_function="sigmoid")


def make_layer(runtime: Runtime, *, is_fp8: bool) -> MoELayer:
    """The same weights every time, its own experts on each rank."""
    torch.manual_seed(runtime.rank)
    layer = MoELayer(HIDDEN, WIDTH, 1, GATE, runtime, is_fp8=is_fp8)
    with torch.no_grad():
        layer.router.weight.copy_(torch.randn(layer.router.weight.shape, generator=torch.Generator().manual_seed(5)))
    return layer


def make_input(rank: int, seed: int = 3) -> Tensor:
    """Rank 1 has fewer tokens."""
    count = NUM_TOKENS if rank != 1 else 5
    generator = torch.Generator().manual_seed(100 * rank + seed)
    return torch.randn(count, HIDDEN, generator=generator).bfloat16().requires_grad_()


def kept_by(layer: MoELayer, x: Tensor) -> tuple[list[Tensor], int]:
    """What autograd keeps of the communication and the experts, and how many rows have come."""
    kept: list[Tensor] = []
    attended = layer.attention(x)
    num_rows = 0
    mlp = layer.mlp

    def counted(received: object) -> Tensor:
        nonlocal num_rows
        num_rows = received.handle.num_rows  # type: ignore[attr-defined]
        return mlp(received)  # type: ignore[arg-type]

    layer.attention, layer.mlp = lambda *_: attended, counted  # type: ignore[assignment,method-assign]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out, _ = overlap.run_layer(layer, x)
    del layer.attention, layer.mlp
    out.float().square().sum().backward()
    return kept, num_rows


def check_keeps_fp8_only(runtime: Runtime) -> None:
    """Of the dispatched rows and of the experts' inner rows nothing is kept in more than a byte per element."""
    wide = {}
    for is_fp8 in (False, True):
        kept, num_rows = kept_by(make_layer(runtime, is_fp8=is_fp8), make_input(runtime.rank))
        rows = [each for each in kept if each.ndim == 2 and len(each) == num_rows and each.shape[1] >= WIDTH]
        wide[is_fp8] = [each for each in rows if isinstance(each, Fp8Rows) or each.dtype != torch.float8_e4m3fn]
        if is_fp8:
            assert len(rows) == 3, [(each.dtype, each.shape) for each in rows]
    assert not wide[True], [(each.dtype, each.shape) for each in wide[True]]
    assert len(wide[False]) >= 3  # the same search finds what BF16 keeps


def gradients_of(layer: MoELayer, x: Tensor) -> dict[str, Tensor]:
    return back(layer, x, overlap.run_layer(layer, x)[0])


def back(layer: MoELayer, x: Tensor, out: Tensor) -> dict[str, Tensor]:
    """Output and all gradients, by name."""
    (out.float() * random_payload(9, len(x), HIDDEN, torch.float32, seed=4)).sum().backward()
    assert x.grad is not None
    found = {"out": out.detach(), "x": x.grad}
    for name, each in layer.named_parameters():
        assert each.grad is not None, name
        found[name] = each.grad
    return found


def check_close_to_bf16(runtime: Runtime) -> None:
    """Every output and gradient within FP8's precision of BF16's, as a whole.

    A cast errs by at most 2^-4, in the square mean 2^-4 / sqrt(3) or less, independently of others; the longest way (to
    the gradient of `gate`) leads past 12 of them: rows, three weights, the inner rows, two kept inputs, gradients of y
    and of the two inputs, and two re-tilings. The gate's own gradient is a difference of such numbers, which has no
    bound relative to itself. A scale that is wrong by a factor of two would give 0.5 or more.
    """
    bound = 12**0.5 * 2**-4 / 3**0.5
    plain, fp8 = (
        gradients_of(make_layer(runtime, is_fp8=is_fp8), make_input(runtime.rank)) for is_fp8 in (False, True)
    )
    for name, ours in fp8.items():
        theirs = plain[name].double()
        if theirs.any() and name != "router.weight":
            error = float((ours.double() - theirs).norm() / theirs.norm())
            assert error < bound, f"{name}: {error}"
    assert not torch.equal(fp8["out"], plain["out"])


class Stacked:
    """The layer in the form that schedules take: state (h, carried)."""

    def __init__(self, layer: MoELayer) -> None:
        self._layer, self.exchange = layer, layer.exchange
        self.named_parameters = layer.named_parameters

    def attention(self, *state: Tensor) -> overlap.Attended:
        h, carried = state
        attended = self._layer.attention(h)
        shared, _ = attended.kept
        return attended._replace(kept=(h, shared, carried))

    def mlp(self, received: object) -> Tensor:
        return self._layer.mlp(received)  # type: ignore[arg-type]

    def finish(self, kept: overlap.State, combined: Tensor) -> overlap.State:
        h, shared, carried = kept
        return h + shared + combined, carried + 0.5 * combined


def check_schedules(runtime: Runtime) -> None:
    """Overlapped gradients are those of the plain run, bit for bit."""
    layers = [Stacked(make_layer(runtime, is_fp8=True)) for _ in range(2)]
    batches = [(make_input(runtime.rank, 2 * each), make_input(runtime.rank, 2 * each + 1)) for each in range(2)]
    expected = job.plain(layers, batches)  # type: ignore[arg-type]
    for way in (job.sequential, job.two_batches, job.paired):
        job.assert_same(way(layers, batches), expected, way.__name__)  # type: ignore[operator]


def check_checkpoint(runtime: Runtime) -> None:
    """Computed again, with and without what has been moved: the same bits."""
    selective = partial(create_selective_checkpoint_contexts, ops.save_communication)
    expected = gradients_of(make_layer(runtime, is_fp8=True), make_input(runtime.rank))
    for options in ({}, {"context_fn": selective}):
        layer, x = make_layer(runtime, is_fp8=True), make_input(runtime.rank)
        out = checkpoint(lambda x, layer=layer: overlap.run_layer(layer, x)[0], x, use_reentrant=False, **options)
        found = back(layer, x, out)
        job.assert_same(found, expected, f"checkpoint {sorted(options)}")


def check_fp8_rows_are_dispatched_as_they_are(runtime: Runtime) -> None:
    """Cast by the caller or on the way: the same rows, and the gradient goes through either way."""
    x = make_input(runtime.rank)
    idx = torch.arange(2).repeat(len(x), 1) + torch.arange(len(x))[:, None] % 6
    cast = Fp8Rows(*quantize_e4m3(x.detach(), pow2=True), x.dtype)
    seen = []
    for given, fp8 in ((x, "pow2"), (cast.requires_grad_(), None)):
        received = ops.dispatch(runtime, given, idx, torch.ones(len(x), 2), fp8=fp8, keep_fp8=True)
        assert isinstance(received.x, Fp8Rows)
        out = ops.combine(runtime, received.x, received.handle)
        out.backward(torch.ones_like(out))
        assert given.grad is not None
        seen.append((received.x.fp8.view(torch.uint8).clone(), received.x.scales.clone(), out.detach(), given.grad))
    for ours, theirs in zip(*seen, strict=True):
        assert torch.equal(ours, theirs)


def fp8_rank(port: int) -> None:
    rank = int(os.environ["COMMLIB_RANK"])
    torch.set_num_threads(1)
    group = part_of_job(port, rank, 2)
    config = small_config(
        hidden=HIDDEN, num_experts=8, num_topk=2, max_tokens=NUM_TOKENS, expert_alignment=128, timeout_s=30.0
    )
    with Runtime(group, config, topology=Topology((0, 1))) as runtime:
        start = runtime.memory().arena_used_bytes
        check_keeps_fp8_only(runtime)
        check_close_to_bf16(runtime)
        check_schedules(runtime)
        check_checkpoint(runtime)
        check_fp8_rows_are_dispatched_as_they_are(runtime)
        assert wait_for(lambda: runtime.memory().arena_used_bytes == start), "rows are kept for ever"
    group.close()


def test_fp8_experts() -> None:
    check_ranks(f"{HERE}:fp8_rank", 2, args=free_ports(1), timeout_s=150)
