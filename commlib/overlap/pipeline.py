"""Carries out a pipeline plan: stages on this rank, transfers to its neighbours by torch.distributed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from commlib.errors import ConfigError
from commlib.overlap.flow import Flow, Grads, run
from commlib.overlap.layer import State
from commlib.overlap.pipeline_plan import Action, Kind, Part, PipelinePlan, Place
from commlib.overlap.schedule import backward, forward, forward_backward
from commlib.overlap.segment import Segment
from commlib.overlap.stage import Stage
from commlib.overlap.weight_grads import WeightWork

__all__ = ["Pipeline"]

LossFunction = Callable[..., Tensor]

_MAX_STATE = 16  # tensors that pass between stages; tags of transfers count in it


@dataclass
class _InPipeline:
    """One micro-batch on one leg of this rank."""

    inputs: State = ()
    flow: Flow | None = None
    outputs: State = ()
    loss: Segment | None = None
    output_grads: Grads | None = None
    input_grads: Grads = ()
    arriving: dict[Kind, list[tuple[Any, Tensor]]] = field(default_factory=dict)


class Pipeline:
    """DualPipe or DualPipeV over the ranks of a process group; collective, like the stages' own communication.

    With expert parallelism beside it, every stage has a Runtime for the ranks that hold the same stage: they make the
    same plan's actions, so they issue the Runtime's operations in one order.

    A transfer waits at most for the group's timeout.

    Args:
        stages: of leg 0 and leg 1, on this rank (`PipelinePlan.stage` says which stages they are).
        plan: of all ranks.
        group: the ranks of the pipeline.
        state_like: tensors with shape, dtype and device of the state that passes between stages; their values and
            memory are not used. Those of floating dtype have gradients.
        loss_fn: `loss_fn(*outputs, target) -> scalar` of one micro-batch. Losses are not divided by anything.

    Raises:
        ConfigError: the group does not fit the plan.
    """

    def __init__(
        self,
        stages: tuple[Stage, Stage],
        plan: PipelinePlan,
        *,
        group: dist.ProcessGroup,
        state_like: Sequence[Tensor],
        loss_fn: LossFunction,
    ) -> None:
        if dist.get_world_size(group) != plan.num_ranks:
            raise ConfigError(f"the group has {dist.get_world_size(group)} ranks, the plan {plan.num_ranks}")
        if len(state_like) > _MAX_STATE:
            raise ConfigError(f"a state of {len(state_like)} tensors, the limit is {_MAX_STATE}")
        self._stages, self._plan, self._group, self._loss_fn = stages, plan, group, loss_fn
        self._rank = dist.get_rank(group)
        self._like = tuple(each.detach().to("meta") for each in state_like)
        self._devices = tuple(each.device for each in state_like)
        self._parts: dict[Part, _InPipeline] = {}
        self._sending: list[tuple[Any, Tensor]] = []
        self._weight_work: deque[tuple[Part, WeightWork]] = deque()
        self._losses: dict[int, Tensor] = {}
        self._has_transferred = self._is_broken = False

    def step(self, inputs: Sequence[State] = (), targets: Sequence[Any] = ()) -> list[Tensor]:
        """Forward and backward passes of all micro-batches; gradients are added to the parameters'.

        Args:
            inputs: per micro-batch, on ranks where micro-batches enter: rank 0, in DualPipe also the last.
            targets: per micro-batch, on ranks where micro-batches end: rank 0, in DualPipe also the last.

        Returns:
            The losses of the micro-batches that end on this rank.

        Raises:
            ConfigError: wrong numbers of inputs or targets; an earlier step has failed between transfers.
            Exception: whatever a stage or a transfer raises. Gradients are incomplete then. If this rank has begun
                transfers, the pipeline is of no further use, because those of another step would meet what is left of
                this one: make a new group and a new Pipeline.
        """
        if self._is_broken:
            raise ConfigError("an earlier step of this pipeline has failed between transfers; make a new group for one")
        self._check_fed(inputs, targets)
        try:
            self._run_plan(inputs, targets)
            return [self._losses[batch] for batch in sorted(self._losses)]
        except BaseException:
            self._is_broken = self._has_transferred
            raise
        finally:
            self._forget_step()

    def _run_plan(self, inputs: Sequence[State], targets: Sequence[Any]) -> None:
        places = [Place(self._rank, leg) for leg in (0, 1)]
        self._parts = {Part(leg, batch): _InPipeline() for leg in (0, 1) for batch in range(self._plan.num_batches)}
        for place in places:
            if self._plan.before(place) is None:
                for batch, state in enumerate(inputs):
                    self._parts[Part(place.leg, batch)].inputs = tuple(state)
        for action in self._plan.actions[self._rank]:
            self._carry_out(action, targets)
        for work, _ in self._sending:
            work.wait()

    def _forget_step(self) -> None:
        """Nothing of a step is left for the next one; of one that failed, what peers may still write and read stays."""
        arriving = {at: _InPipeline(arriving=part.arriving) for at, part in self._parts.items() if part.arriving}
        self._parts = arriving if self._is_broken else {}
        self._sending = self._sending if self._is_broken else []
        self._weight_work.clear()
        self._losses = {}
        self._has_transferred = False

    @torch.no_grad()
    def reduce_twins(self) -> None:
        """DualPipe only: adds up the gradients of the two ranks that hold the same stage. DualPipeV has none: no-op."""
        if self._plan.name != "dualpipe":
            return
        twin = dist.get_global_rank(self._group, self._plan.num_ranks - 1 - self._rank)
        for mine in range(2):
            # Rank r's leg 0 and its twin's leg 1 are the same stage: the lower rank starts with its leg 0.
            leg = mine if self._rank < self._plan.num_ranks // 2 else 1 - mine
            grads = [_grad_of(parameter) for parameter in self._stages[leg].parameters() if parameter.requires_grad]
            theirs = [torch.empty_like(grad) for grad in grads]
            # In one batch: NCCL carries out single transfers of a pair one after the other, and both twins send first.
            batch = [dist.P2POp(dist.isend, grad, twin, self._group, tag) for tag, grad in enumerate(grads)]
            batch += [dist.P2POp(dist.irecv, grad, twin, self._group, tag) for tag, grad in enumerate(theirs)]
            for work in dist.batch_isend_irecv(batch) if batch else ():
                work.wait()
            for grad, other in zip(grads, theirs, strict=True):
                grad.add_(other)

    def _check_fed(self, inputs: Sequence[State], targets: Sequence[Any]) -> None:
        places = [Place(self._rank, leg) for leg in (0, 1)]
        for name, given, is_end in (
            ("inputs", inputs, any(self._plan.before(place) is None for place in places)),
            ("targets", targets, any(self._plan.after(place) is None for place in places)),
        ):
            expected = self._plan.num_batches if is_end else 0
            if len(given) != expected:
                raise ConfigError(f"{len(given)} {name} on rank {self._rank} of the pipeline, the rule: {expected}")

    def _carry_out(self, action: Action, targets: Sequence[Any]) -> None:
        if action.peer is not None:
            self._transfer(action)
        elif action.kind is Kind.WEIGHTS:
            at, works = self._weight_work.popleft()
            assert at == action.backward, f"the oldest gradients of weights are those of {at}, not {action.backward}"
            for work in works:
                work()
        else:
            self._compute(action, targets)

    # ---- computation

    def _compute(self, action: Action, targets: Sequence[Any]) -> None:
        ahead = None if action.forward is None else self._enter(action.forward)
        behind = None if action.backward is None else self._turn(action.backward)
        if ahead is not None and behind is not None:
            run(forward_backward(ahead.num_layers, behind.num_layers), {0: ahead, 1: behind})
        elif ahead is not None:
            run(forward(ahead.num_layers), {0: ahead})
        elif behind is not None:
            run(backward(behind.num_layers, with_weights=action.kind is Kind.BACKWARD), {0: behind})
        if action.forward is not None:
            self._leave(action.forward, targets)
        if action.backward is not None and behind is not None:
            part = self._parts[action.backward]
            part.input_grads, part.flow = behind.take_input_grads(), None
            if action.kind is Kind.BACKWARD_INPUT:
                self._weight_work.append((action.backward, behind.take_weight_work()))
            self._hand_back(action.backward)

    def _enter(self, at: Part) -> Flow:
        """The flow of a micro-batch that begins its forward pass here."""
        part = self._parts[at]
        if Kind.RECV_FORWARD in part.arriving:
            received = _arrived(part.arriving.pop(Kind.RECV_FORWARD))
            part.inputs = tuple(each.requires_grad_(each.is_floating_point()) for each in received)
        part.flow = Flow(self._stages[at.leg].layers, part.inputs)
        part.inputs = ()
        return part.flow

    def _leave(self, at: Part, targets: Sequence[Any]) -> None:
        """After the forward pass: the loss, or on to the other leg of this rank; a send follows in the plan."""
        part, after = self._parts[at], self._plan.after(Place(self._rank, at.leg))
        assert part.flow is not None
        outputs = part.flow.take_outputs()
        if after is None:
            target = targets[at.batch]
            part.loss = Segment(outputs, lambda *outputs: (self._loss_fn(*outputs, target),))
            (self._losses[at.batch],) = part.loss.take_outputs()
        elif after.rank == self._rank:
            state = tuple(each.requires_grad_(each.is_floating_point()) for each in outputs)
            self._parts[Part(after.leg, at.batch)].inputs = state
        else:
            part.outputs = outputs

    def _turn(self, at: Part) -> Flow:
        """The flow of a micro-batch that begins its backward pass here."""
        part = self._parts[at]
        assert part.flow is not None
        if Kind.RECV_BACKWARD in part.arriving:
            grads = iter(_arrived(part.arriving.pop(Kind.RECV_BACKWARD)))
            part.output_grads = [next(grads) if each.is_floating_point() else None for each in self._like]
        elif part.loss is not None:
            part.output_grads = part.loss.backward((torch.ones_like(self._losses[at.batch]),))
            part.loss = None
        assert part.output_grads is not None, f"no gradients have come for {at}"
        part.flow.set_output_grads(part.output_grads)
        part.output_grads = None
        return part.flow

    def _hand_back(self, at: Part) -> None:
        """After the backward pass: on to the other leg of this rank, if the micro-batch came from there."""
        before = self._plan.before(Place(self._rank, at.leg))
        if before is not None and before.rank == self._rank:
            self._parts[Part(before.leg, at.batch)].output_grads = self._parts[at].input_grads
            self._parts[at].input_grads = ()

    # ---- transfers

    def _transfer(self, action: Action) -> None:
        """Both ends of a pair of ranks make its transfers in the plan's one order: NCCL goes by that, not by tags."""
        self._has_transferred = True
        is_forward = action.forward is not None
        at = action.forward if action.forward is not None else action.backward
        assert at is not None and action.peer is not None
        part, peer = self._parts[at], dist.get_global_rank(self._group, action.peer)
        tag = _MAX_STATE * (2 * (at.leg * self._plan.num_batches + at.batch) + (not is_forward))
        places = [place for place, like in enumerate(self._like) if is_forward or like.is_floating_point()]
        if action.kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD):
            buffers = [torch.empty_like(self._like[place], device=self._devices[place]) for place in places]
            part.arriving[action.kind] = [
                (dist.irecv(buffer, peer, self._group, tag + number), buffer) for number, buffer in enumerate(buffers)
            ]
            return
        tensors = part.outputs if is_forward else part.input_grads
        for number, place in enumerate(places):
            tensor = self._checked(tensors[place], place)
            self._sending.append((dist.isend(tensor, peer, self._group, tag + number), tensor))
        part.outputs, part.input_grads = (), ()
        self._sending = [(work, tensor) for work, tensor in self._sending if not work.is_completed()]

    def _checked(self, tensor: Tensor | None, place: int) -> Tensor:
        like = self._like[place]
        if tensor is None:  # a gradient that nothing contributed to
            return torch.zeros(like.shape, dtype=like.dtype, device=self._devices[place])
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ConfigError(
                f"tensor {place} of the state is {tensor.dtype} {list(tensor.shape)}, "
                f"state_like says {like.dtype} {list(like.shape)}"
            )
        return tensor.contiguous()


def _arrived(transfers: list[tuple[Any, Tensor]]) -> list[Tensor]:
    for work, _ in transfers:
        work.wait()
    return [tensor for _, tensor in transfers]


def _grad_of(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
