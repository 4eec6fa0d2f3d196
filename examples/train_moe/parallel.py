"""Who holds what, and the collectives that commlib does not do.

Ranks form a grid. The ranks of a row share the experts (a commlib Runtime each row) and, with `shard_dense`, the large
dense parameters (FSDP2); rows repeat each other. A gradient is the sum over all ranks' tokens:

* experts: commlib's backward brings the gradients of the row's tokens; the rows are summed here;
* sharded parameters: FSDP2 reduces and scatters within the row and sums the rows;
* all others are the same on every rank and summed over all of them.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in torch's __all__
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from commlib import bootstrap
from examples.moe_layer import Linear, RoutedExperts, SwiGLU
from examples.train_moe.attention import MLA
from examples.train_moe.config import ParallelConfig

TIMEOUT_S = 60.0


def connect(device_type: str = "cpu") -> bootstrap.Bootstrap:
    """Finds the other ranks, however they were started, and sets torch.distributed up among them.

    Gloo meets at rank 0: on loopback if all ranks are on one host, else at rank 0's host name. MASTER_ADDR overrules
    that, as GLOO_SOCKET_IFNAME does for the interface that gloo itself uses.
    """
    ranks = bootstrap.connect()
    hosts = [name.decode() for name in ranks.allgather(socket.gethostname().encode(), timeout_s=TIMEOUT_S)]
    host = os.environ.get("MASTER_ADDR", "127.0.0.1" if len(set(hosts)) == 1 else hosts[0])
    store = None
    if ranks.rank == 0:
        store = TCPStore(host, 0, ranks.size, is_master=True, wait_for_workers=False)
    port = str(store.port) if store else ""
    port = ranks.allgather(port.encode(), timeout_s=TIMEOUT_S)[0].decode()
    if store is None:
        store = TCPStore(host, int(port), ranks.size, is_master=False, wait_for_workers=False)
    backend = "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=timeout)
    return ranks


class Grid:
    """The ranks in rows of `ep_ranks`.

    Attributes:
        device: where this rank computes.
        mesh: dimensions "replicate" (rows) and "shard" (ranks of a row), for collectives of that device.
        host_mesh: the same for tensors in CPU memory.
    """

    def __init__(self, ranks: bootstrap.Bootstrap, config: ParallelConfig, device: torch.device) -> None:
        self.device = device
        self.rank, self.num_ranks = ranks.rank, ranks.size
        self.num_row_ranks = config.ep_ranks or ranks.size
        if ranks.size % self.num_row_ranks:
            raise ValueError(f"ep_ranks={self.num_row_ranks} does not divide the number of ranks, {ranks.size}")
        shape, names = (ranks.size // self.num_row_ranks, self.num_row_ranks), ("replicate", "shard")
        self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        self.host_mesh = self.mesh if device.type == "cpu" else init_device_mesh("cpu", shape, mesh_dim_names=names)
        self._ranks = ranks

    @property
    def num_rows(self) -> int:
        return self.num_ranks // self.num_row_ranks

    def experts_group(self) -> Any:
        """For the Runtime of this rank's row."""
        return self._ranks if self.num_rows == 1 else self.host_mesh.get_group("shard")

    def row_group(self, *, is_host: bool = False) -> dist.ProcessGroup:
        """The ranks of this row."""
        return (self.host_mesh if is_host else self.mesh).get_group("shard")

    def column_group(self, *, is_host: bool = False) -> dist.ProcessGroup:
        """The ranks that hold what this one holds, one of each row."""
        return (self.host_mesh if is_host else self.mesh).get_group("replicate")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (its memory, not a copy); any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_global(part: Tensor, like: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part as a tensor that is sharded like another one; `part` itself if that is not sharded."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def expert_parameters(model: nn.Module) -> dict[str, int]:
    """Name of each parameter that holds routed experts -> global number of the expert in its row 0."""
    return {
        f"{prefix}.{name}": module.first_expert
        for prefix, module in model.named_modules()
        if isinstance(module, RoutedExperts)
        for name, _ in module.named_parameters()
    }


def by_expert(tensors: Mapping[str, Tensor], first_expert: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
    """(global name, view) of every tensor; one of stacked experts gives a view for each, named by its global number.

    Names and shapes do not depend on the number of ranks, so neither do initial weights and checkpoints.
    """
    for name, tensor in tensors.items():
        if name not in first_expert:
            yield name, tensor
            continue
        for row, view in enumerate(tensor.unbind(0)):
            yield f"{name}.{first_expert[name] + row}", view


@torch.no_grad()
def initialise(model: nn.Module, seed: int, *, on_device: bool = False) -> None:
    """Normal weights with deviation `in_features ** -0.5`, each tensor from a seed of its own global name.

    Gains of norms stay 1. Embeddings have deviation 1; projections into the residual stream start smaller, by the
    usual `1 / sqrt(2 * layers)` for two per layer. They are drawn on the CPU, so that the numbers are the same whatever
    the device, or `on_device`: much faster on a GPU.
    """
    num_layers = len(list(model.get_submodule("blocks").children()))
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    for name, weight in by_expert(weights, expert_parameters(model)):
        device = weight.device if on_device else torch.device("cpu")
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        deviation = weight.shape[1] ** -0.5
        if name == "embedding.weight":
            deviation = 1.0
        elif ".down." in name or ".out." in name:
            deviation /= (2 * num_layers) ** 0.5
        weight.copy_(torch.empty(weight.shape, device=device).normal_(0.0, deviation, generator=generator))


def shard_dense(model: nn.Module, mesh: DeviceMesh) -> list[nn.Module]:
    """Shards the large dense parameters over the rows of the grid; returns the modules that hold them.

    Norms of blocks and gates stay whole: they are small, and used outside of the modules that can be sharded.
    """
    from torch.distributed.fsdp import fully_shard  # takes a second to load

    units: list[nn.Module] = [each for each in model.modules() if isinstance(each, MLA | SwiGLU | nn.Embedding)]
    units += [module for name, module in model.named_modules() if isinstance(module, Linear) and name in _SINGLE_LINEAR]
    for unit in units:
        sharded: Any = fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)  # sums: the losses are divided already
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return units


_SINGLE_LINEAR = ("head", "mtp.project")


def hold_gradients(units: Iterable[nn.Module]) -> None:
    """Until `reduce_gradients`, backward passes add up gradients on this rank.

    An overlapped schedule computes gradients of weights after the backward pass of their module, which is when FSDP2
    would reduce them.
    """
    for unit in units:
        sharded: Any = unit
        sharded.set_requires_gradient_sync(False)
        sharded.set_reshard_after_backward(False)


def reduce_gradients(units: Iterable[nn.Module]) -> None:
    """Reduces what `hold_gradients` has kept: what torch's own pipelines do at the end of a step."""
    from torch.distributed.fsdp import fully_shard

    for unit in units:
        sharded: Any = unit
        sharded.set_is_last_backward(True)
        sharded.set_requires_gradient_sync(True)
        sharded.set_reshard_after_backward(True)
        state: Any = fully_shard.state(unit)  # type: ignore[attr-defined]
        for each in state._state_ctx.all_states:
            for group in each._fsdp_param_groups:
                group.post_backward()
        state._root_post_backward_final_callback()


def all_reduce_gradients(gradients: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Sums gradients over the ranks of a group (None: all) in one message."""
    gradients = list(gradients)
    flat = torch.cat([grad.flatten() for grad in gradients])
    dist.all_reduce(flat, group=group)
    for grad, total in zip(gradients, torch.split(flat, [grad.numel() for grad in gradients]), strict=True):
        grad.copy_(total.view_as(grad))
