"""A policy's tensors over all ranks: which ought to train, their norms, copies beside them."""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from turnwise.trainer import fsdp
from turnwise.trainer.lora_layer import LINEAR, LoraLinear
from turnwise.trainer.step import Learner

AWAKE_STD = 1e-3  # of a B for trial: changes a layer's output by about a hundredth


def expected_tensors(learner: Learner) -> set[str]:
    """Names of the tensors that the configuration says train: from the model's layers, not from what does train."""
    model, lora = learner.policy.model, learner.lora
    if lora is None:
        return {name for name, _ in model.named_parameters()}
    layers = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in lora.target_modules and isinstance(module, (LoraLinear, *LINEAR))
    ]
    return {f"{name}.{matrix}" for name in layers for matrix in ("lora_A", "lora_B")}


def norms(tensors: Sequence[Tensor | None]) -> list[float]:
    """L2 norm of each whole tensor, 0 for None; a collective."""
    squares = [
        torch.zeros((), dtype=torch.float64)
        if tensor is None
        else torch.linalg.vector_norm(fsdp.local(tensor.detach()), dtype=torch.float64).square().cpu() / fsdp.copies(tensor)
        for tensor in tensors
    ]
    return [math.sqrt(square) for square in fsdp.sum_over_ranks(torch.stack(squares)).tolist()] if squares else []


def host_copies(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """This rank's parts, copied to the CPU's memory: on the GPU they might not fit twice."""
    return [fsdp.local(parameter.detach()).to("cpu", copy=True) for parameter in parameters]


@contextmanager
def awake_adapter(learner: Learner) -> Generator[None]:
    """Inside, every B is small noise instead of 0, so that A has a gradient; gradients from before are laid aside."""
    gradients = [parameter.grad for parameter in learner.trained]
    learner.optimizer.zero_grad()
    matrices = [parameter for name, parameter in learner.parameters.items() if name.endswith(".lora_B")]
    held = host_copies(matrices)
    for index, matrix in enumerate(matrices):
        local = fsdp.local(matrix.detach())
        noise = torch.randn(local.shape, generator=torch.Generator().manual_seed(index)) * AWAKE_STD
        local.copy_(noise)
    try:
        yield
    finally:
        for matrix, values in zip(matrices, held, strict=True):
            fsdp.local(matrix.detach()).copy_(values)
        for parameter, gradient in zip(learner.trained, gradients, strict=True):
            parameter.grad = gradient
