"""What commlib does not do: the collectives of the dense parts, and the global name of every tensor.

Dense parameters are the same on all ranks and their gradients are summed by torch.distributed (gloo). Expert parameters
exist once; commlib's backward brings them the gradients of all ranks' tokens.
"""

from __future__ import annotations

import os
import socket
import zlib
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in torch's __all__

from commlib import bootstrap
from examples.moe_layer import RoutedExperts

TIMEOUT_S = 60.0


def connect() -> bootstrap.Bootstrap:
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
    dist.init_process_group("gloo", store=store, rank=ranks.rank, world_size=ranks.size)
    return ranks


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
def initialise(model: nn.Module, seed: int) -> None:
    """Normal weights with deviation `in_features ** -0.5`, each tensor from a seed of its own global name.

    Gains of norms stay 1. Embeddings have deviation 1; projections into the residual stream start smaller, by the
    usual `1 / sqrt(2 * layers)` for two per layer.
    """
    num_layers = len(list(model.get_submodule("blocks").children()))
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    for name, weight in by_expert(weights, expert_parameters(model)):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        deviation = weight.shape[1] ** -0.5
        if name == "embedding.weight":
            deviation = 1.0
        elif ".down." in name or ".out." in name:
            deviation /= (2 * num_layers) ** 0.5
        weight.normal_(0.0, deviation, generator=generator)


def all_reduce_gradients(gradients: Iterable[Tensor]) -> None:
    """Sums dense gradients over ranks in one message."""
    gradients = list(gradients)
    flat = torch.cat([grad.flatten() for grad in gradients])
    dist.all_reduce(flat)
    for grad, total in zip(gradients, torch.split(flat, [grad.numel() for grad in gradients]), strict=True):
        grad.copy_(total.view_as(grad))
