"""The learning-rate schedule, gradient clipping, and how far a step moved the parameters."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from turnwise.config import OptimConfig
from turnwise.trainer import fsdp

CHUNK = 1 << 25  # elements that are summed at a time: their squares are float64, 256 MiB


def learning_rate(config: OptimConfig, step: int, max_steps: int | None) -> float:
    """Learning rate of a step, counted from 1: warm-up to `lr`, then the schedule down to `min_lr_ratio * lr` at `max_steps`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant" or max_steps is None:
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """Global L2 norm of the gradients; a collective."""
    return global_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, max_norm: float | None) -> None:
    """Scale gradients of global norm `norm` down to `max_norm`."""
    if max_norm is None or norm <= max_norm:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(max_norm / norm)


def snapshot(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Copies of this rank's parameters, to measure several updates against."""
    return [parameter.detach().clone() for parameter in parameters]


def distance(before: list[Tensor], parameters: Iterable[nn.Parameter]) -> float:
    """L2 norm of the change since `snapshot`; a collective."""
    return global_norm(now.detach() - old for now, old in zip(parameters, before, strict=True))


def global_norm(tensors: Iterable[Tensor]) -> float:
    """L2 norm over tensors that are all sharded alike, or not at all, summed in float64; a collective."""
    squares: list[Tensor] = []
    copies = 1
    for tensor in tensors:
        copies = fsdp.copies(tensor)
        chunks = fsdp.local(tensor).reshape(-1).split(CHUNK)
        squares += [torch.linalg.vector_norm(chunk, dtype=torch.float64).square() for chunk in chunks]
    return norm_over_ranks(torch.stack(squares).sum(), copies) if squares else 0.0


def norm_over_ranks(square_sum: Tensor, copies: int) -> float:
    """L2 norm from the sum of squares of each rank's parts, of which `copies` ranks each hold the same; a collective."""
    total = fsdp.sum_over_ranks(square_sum.detach().to("cpu", torch.float64, copy=True))
    return math.sqrt(float(total) / copies)
