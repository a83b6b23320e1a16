"""The processes of the trainer: start-up, sharding by FSDP2, and what they tell each other."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

T = TypeVar("T")


@contextmanager
def process_group(*, cuda: bool, timeout_s: float) -> Generator[torch.device]:
    """Join the process group that torchrun describes (alone without torchrun); gives the device of this process."""
    timeout = timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield device
    finally:
        dist.destroy_process_group()


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
    """FSDP2: one group a decoder layer, the rest in the root's.

    Gradients are summed, not averaged: the loss is divided by totals of the whole step. Divide factor and sum are both set, since
    gloo has no average and PyTorch's own choice would ask it for one.

    Args:
        policy: the root; its forward must be the one that is called.
        layers: the decoder layers inside it.
        device: where parameters live.
        compute_dtype: type of gathered parameters, over float32 ones that are trained; None leaves them as they are.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    policy_of = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy_of)
    fully_shard(policy, mesh=mesh, mp_policy=policy_of)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


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


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)
