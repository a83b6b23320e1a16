"""The processes of the trainer: start-up, sharding by FSDP2, and what they tell each other.

On several nodes parameters are sharded over the processes of a node and replicated over nodes (HSDP): what is gathered in every
layer stays on the fast links, and only gradients cross the slow ones, once an update.
"""

import math
import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

T = TypeVar("T")

REPLICATE, SHARD = "replicate", "shard"  # dimensions of the mesh


class Meshes:
    """How processes are arranged: `replicas` rows, each of which holds the whole model between its processes.

    torchrun numbers the processes of a node one after another, so a row lies within a node when there are as many rows as nodes,
    or a multiple.
    """

    def __init__(self, replicas: int) -> None:
        self.replicas = replicas
        self._made: dict[str, DeviceMesh] = {}

    def on(self, device_type: str) -> DeviceMesh:
        """The mesh for tensors on such devices; the first call is a collective."""
        if device_type not in self._made:
            shards = world_size() // self.replicas
            self._made[device_type] = (
                init_device_mesh(device_type, (shards,), mesh_dim_names=(SHARD,))
                if self.replicas == 1
                else init_device_mesh(device_type, (self.replicas, shards), mesh_dim_names=(REPLICATE, SHARD))
            )
        return self._made[device_type]


_meshes: ContextVar[Meshes] = ContextVar("meshes")  # of the process group, which is one for the whole process as well


def meshes() -> Meshes:
    """The arrangement of the current process group."""
    return _meshes.get()


@contextmanager
def process_group(*, cuda: bool, timeout_s: float, replicas: int | None = None) -> Generator[torch.device]:
    """Join the process group that torchrun describes (alone without torchrun); gives the device of this process.

    Args:
        cuda: whether each process has a GPU, that of its local rank.
        timeout_s: deadline of a collective.
        replicas: copies of the sharded model, `trainer.model.replicas`; None makes one a node.

    Raises:
        ValueError: `replicas` does not divide the number of processes.
    """
    timeout = timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    failed = True
    try:
        token = _meshes.set(Meshes(_replicas(replicas)))
        try:
            yield device
        finally:
            _meshes.reset(token)
        failed = False
    finally:
        if not (failed and cuda):  # NCCL would wait for collectives in which other ranks still are; the process ends without it
            dist.destroy_process_group()


def _replicas(wanted: int | None) -> int:
    processes = world_size()
    if wanted is None:
        per_node = set(gather(int(os.environ.get("LOCAL_WORLD_SIZE", processes))))
        return processes // per_node.pop() if len(per_node) == 1 else 1  # nodes of different sizes: sharded over all
    if processes % wanted:
        fitting = [str(count) for count in range(1, processes + 1) if processes % count == 0]
        raise ValueError(
            f"trainer.model.replicas = {wanted} does not divide the {processes} processes of the trainer; "
            f"use {', '.join(fitting)}, or leave it out for one a node"
        )
    return wanted


def rank() -> int:
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def broadcast(value: T) -> T:
    """Rank 0's value, everywhere."""
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return cast(T, box[0])


def gather(value: T) -> list[T]:
    """Every rank's value, everywhere, by rank."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def sum_over_ranks(values: Tensor) -> Tensor:
    dist.all_reduce(values, op=dist.ReduceOp.SUM)
    return values


def max_over_ranks(values: Tensor) -> Tensor:
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def shard(policy: nn.Module, layers: nn.ModuleList, *, device: torch.device, compute_dtype: torch.dtype | None) -> None:
    """FSDP2: one group a decoder layer, the rest in the root's; over the mesh of the process group.

    Gradients are summed, not averaged, over both dimensions of the mesh: the loss is divided by totals of the whole step. Divide
    factor and sum are both set: the sum is PyTorch's choice for the second dimension alone, and gloo has no average.

    Args:
        policy: the root; its forward must be the one that is called.
        layers: the decoder layers inside it.
        device: where parameters live.
        compute_dtype: type of gathered parameters, over float32 ones that are trained; None leaves them as they are.
    """
    mesh = meshes().on(device.type)
    policy_of = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy_of)
    fully_shard(policy, mesh=mesh, mp_policy=policy_of)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def arrangement(policy: nn.Module) -> str:
    """Who holds what of a policy, in words."""
    processes = f"{world_size()} process{'es' if world_size() > 1 else ''}"
    if world_size() == 1:
        return processes
    if not isinstance(policy, FSDPModule):
        return f"{processes} with a copy each"
    replicas = meshes().replicas
    return f"{processes}, {f'{replicas} replicas each ' if replicas > 1 else ''}sharded over {world_size() // replicas}"


def reduce_gradients(parameters: list[nn.Parameter]) -> None:
    """Sum gradients over ranks that hold whole copies (`trainer.model.shard = false`)."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, op=dist.ReduceOp.SUM)


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded; a collective. Detached."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(tensor: Tensor) -> int:
    """How many processes hold the same part of a tensor; 1 for one that is sharded over all of them."""
    if not isinstance(tensor, DTensor):
        return world_size()
    mesh = tensor.device_mesh
    shards = [mesh.size(dim) for dim, placement in enumerate(tensor.placements) if placement.is_shard()]
    return mesh.size() // math.prod(shards)


def accumulate(policy: nn.Module, *, last: bool, whole: bool) -> None:
    """Before each micro-batch of a step: what FSDP2 does with its gradients; nothing for a policy that is not sharded.

    Args:
        policy: what `shard` was given.
        last: whether the gradients are complete after this micro-batch. Replicas sum theirs then, and not before.
        whole: keep whole gradients until then, which saves the sum over shards in every micro-batch; for small ones.
    """
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(last or not whole)
        policy.set_requires_all_reduce(last)
