"""What the ranks of test_pipeline.py run: pipelines against the same stages one after the other, bit by bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from unittest import mock

import overlap_job as job
import pytest
import torch
import torch.distributed as dist
from moe_job import HIDDEN, small_config
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV

from commlib.errors import ConfigError
from commlib.overlap import State, pipeline
from commlib.overlap.pipeline import Pipeline
from commlib.overlap.pipeline_plan import Action, PipelinePlan, Place, dualpipe, dualpipe_v
from commlib.overlap.stage import Stage
from commlib.overlap.torch_schedule import _run_pair, overlap_pairs
from commlib.runtime import Runtime
from commlib.topology import Topology

NUM_TOKENS = 12
LIKE = (torch.empty(NUM_TOKENS, HIDDEN), torch.empty(NUM_TOKENS, HIDDEN))


class Grid:
    """Four ranks as pipelines of `depth` ranks; ranks that hold the same stages share experts."""

    def __init__(self, depth: int) -> None:
        width, rank = dist.get_world_size() // depth, dist.get_rank()
        timeout = timedelta(seconds=30)
        for column in range(width):
            group = dist.new_group([column + width * row for row in range(depth)], timeout=timeout)
            if rank % width == column:
                self.pipe = group
        for row in range(depth):
            group = dist.new_group([width * row + column for column in range(width)], timeout=timeout)
            if rank // width == row:
                self.experts = group
        self.column = rank % width

    def open_runtime(self) -> Runtime:
        config = small_config(num_experts=job.NUM_EXPERTS, num_topk=job.NUM_TOPK, timeout_s=20.0, num_threads=1)
        return Runtime(self.experts, config, topology=Topology((0,) * dist.get_world_size(self.experts)))


def make_stage(runtime: Runtime, stage: int, **options: bool) -> Stage:
    """One or two layers, the same numbers wherever the stage is."""
    return Stage(job.make_layers(runtime, 1 + stage % 2, seed=10 * stage), **options)


def batch_of(grid: Grid, number: int) -> State:
    """Different on the ranks that share experts."""
    return job.make_inputs(2 * grid.column, number, num_tokens=NUM_TOKENS)


def loss_of(first: Tensor, second: Tensor, target: Tensor) -> Tensor:
    return (job.loss_of((first, second)) * target).sum()


def target_of(number: int) -> Tensor:
    return torch.tensor(1.0 + number)


def one_after_the_other(stages: Sequence[Stage], grid: Grid, numbers: Sequence[int]) -> list[Tensor]:
    """Micro-batches through all stages on this rank, in plain order; adds gradients, returns losses."""
    losses = []
    for number in numbers:
        state = batch_of(grid, number)
        for stage in stages:
            for layer in stage.layers:
                state = job.overlap.run_layer(layer, *state)
        loss = loss_of(*state, target_of(number))
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
    return losses


def taken_gradients(stage: Stage) -> dict[str, Tensor]:
    found = {}
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, name
        found[name], parameter.grad = parameter.grad, None
    return found


def feeds(plan: PipelinePlan, rank: int, grid: Grid, offset: int = 0) -> dict[str, list[Any]]:
    """What `Pipeline.step` of a rank gets; in DualPipe the far end's micro-batches have numbers of their own."""
    numbers = range(plan.num_batches)
    given: dict[str, list[Any]] = {"inputs": [], "targets": []}
    for leg in (0, 1):
        shift = plan.num_batches if plan.name == "dualpipe" and leg == 1 else 0
        if plan.before(Place(rank, leg)) is None:
            given["inputs"] = [batch_of(grid, shift + number) for number in numbers]
        if plan.after(Place(rank, leg)) is None:
            given["targets"] = [target_of(shift + number) for number in numbers]
    return given


def check_pipeline(plan: PipelinePlan) -> None:
    grid = Grid(plan.num_ranks)
    rank = dist.get_rank(grid.pipe)
    with grid.open_runtime() as runtime:
        legs = (Place(rank, 0), Place(rank, 1))
        modules = make_stage(runtime, plan.stage(legs[0])), make_stage(runtime, plan.stage(legs[1]))
        ours = Pipeline(modules, plan, group=grid.pipe, state_like=LIKE, loss_fn=loss_of)
        whole = [make_stage(runtime, stage) for stage in range(plan.num_stages)]
        numbers = list(range(plan.num_batches))
        if plan.name == "dualpipe":
            # Each direction adds up its own micro-batches, then the twins add.
            expected_losses = {1: one_after_the_other(whole, grid, numbers)}
            expected = [taken_gradients(stage) for stage in whole]
            expected_losses[0] = one_after_the_other(whole, grid, [plan.num_batches + each for each in numbers])
            for there, stage in zip(expected, whole, strict=True):
                for name, grad in taken_gradients(stage).items():
                    there[name] += grad
        else:
            expected_losses = {0: one_after_the_other(whole, grid, numbers)}
            expected = [taken_gradients(stage) for stage in whole]
        ends = [leg for leg in (0, 1) if plan.after(Place(rank, leg)) is None]
        for turn in range(2):  # a second step finds nothing left of the first
            losses = ours.step(**feeds(plan, rank, grid))
            ours.reduce_twins()
            wanted = expected_losses[0 if rank == 0 else 1] if ends else []
            assert [float(loss) for loss in losses] == [float(loss) for loss in wanted], f"{plan.name}: losses"
            for leg, module in enumerate(modules):
                stage = plan.stage(Place(rank, leg))
                job.assert_same(taken_gradients(module), expected[stage], f"{plan.name}, turn {turn}, stage {stage}")
        assert not ours._parts and not ours._weight_work and not ours._sending


class OneAfterTheOther:
    """torch.distributed with the transfers of NCCL: those of a pair of ranks that are no batch happen in the order in
    which they are issued, whatever their tags are, and a send ends when its receive does."""

    _done = SimpleNamespace(wait=lambda: True, is_completed=lambda: True)

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def isend(self, tensor: Tensor, peer: int, group: dist.ProcessGroup, tag: int = 0) -> Any:
        dist.send(tensor, peer, group)
        dist.recv(torch.empty(1), peer, group, tag=1)
        return self._done

    def irecv(self, tensor: Tensor, peer: int, group: dist.ProcessGroup, tag: int = 0) -> Any:
        dist.recv(tensor, peer, group)
        dist.send(torch.empty(1), peer, group, tag=1)
        return self._done

    def P2POp(self, op: Callable[..., Any], *arguments: Any) -> dist.P2POp:
        return dist.P2POp(dist.isend if op == self.isend else dist.irecv, *arguments)


class Failure(Exception):
    pass


def failing_at(place: int) -> Any:
    """`Pipeline`s raise in place of the action with this number."""
    carry_out, number = Pipeline._carry_out, iter(range(10_000))

    def replaced(self: Pipeline, action: Action, targets: Sequence[Any]) -> None:
        if next(number) == place:
            raise Failure
        carry_out(self, action, targets)

    return mock.patch.object(Pipeline, "_carry_out", replaced)


def check_failures_without_transfers() -> None:
    """One rank: wherever a step fails, the next one computes what it should."""
    plan = dualpipe_v(1, 3)
    grid = Grid(1)
    with grid.open_runtime() as runtime:
        modules = make_stage(runtime, 0), make_stage(runtime, 1)
        ours = Pipeline(modules, plan, group=grid.pipe, state_like=LIKE, loss_fn=loss_of)
        ours.step(**feeds(plan, 0, grid))
        expected = [taken_gradients(module) for module in modules]
        for place in range(len(plan.actions[0])):
            with failing_at(place), pytest.raises(Failure):
                ours.step(**feeds(plan, 0, grid))
            for module in modules:
                module.zero_grad()
            ours.step(**feeds(plan, 0, grid))
            for module, grads in zip(modules, expected, strict=True):
                job.assert_same(taken_gradients(module), grads, f"after a failure at action {place}")


def check_failure_of_a_pair() -> None:
    """What torch's schedule would find in the stages of the next step is gone."""
    left = Stage([], defers_weights=True)
    left.expect(mock.Mock())
    left._weight_work = (mock.Mock(),)
    stage = SimpleNamespace(stage_index=0, submod=left)
    pair = SimpleNamespace(sub_actions=[SimpleNamespace(stage_index=0, microbatch_index=0)] * 2)
    schedule = mock.Mock(_stages=[stage], fwd_recv_ops=mock.Mock(pop=mock.Mock(side_effect=Failure)))
    with pytest.raises(Failure):
        _run_pair(pair, SimpleNamespace(schedule_ref=schedule))
    assert left._flow_ahead is None
    left.build_weight_step()()


def check_failure_between_transfers() -> None:
    """Two ranks: a step that has failed is the last one, and says so at once."""
    plan = dualpipe_v(2, 4)
    grid = Grid(2)
    rank = dist.get_rank(grid.pipe)
    with grid.open_runtime() as runtime:
        modules = tuple(make_stage(runtime, plan.stage(Place(rank, leg))) for leg in (0, 1))
        ours = Pipeline((modules[0], modules[1]), plan, group=grid.pipe, state_like=LIKE, loss_fn=loss_of)
        with failing_at(len(plan.actions[rank]) - 1), pytest.raises(Failure):
            ours.step(**feeds(plan, rank, grid))
        dist.barrier()  # the other rank may still wait for what this one has sent
        with pytest.raises(ConfigError, match="failed between transfers"):
            ours.step(**feeds(plan, rank, grid))


def check_torch_schedule(*, is_overlapped: bool) -> None:
    """ScheduleDualPipeV of torch with modules as its stages' modules."""
    depth, num_batches = 2, 5
    grid = Grid(depth)
    rank = dist.get_rank(grid.pipe)
    with grid.open_runtime() as runtime:
        stages = []
        for index in (rank, 2 * depth - 1 - rank):
            module = make_stage(runtime, index, defers_weights=True)
            like = tuple(each.clone().requires_grad_() for each in LIKE)
            stages.append(
                PipelineStage(
                    module,
                    index,
                    2 * depth,
                    torch.device("cpu"),
                    input_args=like,
                    output_args=like,
                    group=grid.pipe,
                    dw_builder=module.build_weight_step,
                )
            )
        schedule = ScheduleDualPipeV(
            stages, num_batches, loss_fn=lambda outputs, target: loss_of(*outputs, target[0]), scale_grads=False
        )
        if is_overlapped:
            overlap_pairs(schedule)
        whole = [make_stage(runtime, stage) for stage in range(2 * depth)]
        expected_losses = one_after_the_other(whole, grid, list(range(num_batches)))
        expected = [taken_gradients(stage) for stage in whole]
        if rank == 0:
            batches = [batch_of(grid, number) for number in range(num_batches)]
            inputs = [torch.cat([state[part].detach() for state in batches]).requires_grad_() for part in (0, 1)]
            targets = torch.stack([target_of(number) for number in range(num_batches)])
            losses: list[Tensor] = []
            schedule.step(*inputs, target=targets, losses=losses)
            assert [float(loss) for loss in losses] == [float(loss) for loss in expected_losses]
        else:
            schedule.step()
        for stage in stages:
            what = f"torch, overlapped {is_overlapped}, stage {stage.stage_index}"
            job.assert_same(taken_gradients(stage.submod), expected[stage.stage_index], what)


@contextmanager
def joined(port: int) -> Iterator[None]:
    rank, size = (int(os.environ[name]) for name in ("COMMLIB_RANK", "COMMLIB_WORLD_SIZE"))
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0, timeout=timedelta(seconds=30))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


def pipeline_rank(port: int) -> None:
    with joined(port):
        check_pipeline(dualpipe(4, 4))
        check_pipeline(dualpipe_v(2, 5))
        check_torch_schedule(is_overlapped=False)
        check_torch_schedule(is_overlapped=True)


def in_order_rank(port: int) -> None:
    with joined(port), mock.patch.object(pipeline, "dist", OneAfterTheOther()):
        check_pipeline(dualpipe(4, 4))


def failing_rank(port: int) -> None:
    with joined(port):
        check_failures_without_transfers()
        check_failure_of_a_pair()


def failing_pair_rank(port: int) -> None:
    with joined(port):
        check_failure_between_transfers()
