"""The learning-rate schedule, gradient clipping, and how far a step moved the parameters."""

import math
from collections.abc import Iterable, Iterator, Sequence

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


def gradient_norm(parameters: Sequence[nn.Parameter]) -> float:
    """Global L2 norm of the gradients; a collective."""
    gradients = (parameter.grad for parameter in parameters if parameter.grad is not None)
    return global_norm(gradients, copies=fsdp.copies(parameters[0]))


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, max_norm: float | None) -> None:
    """Scale gradients of global norm `norm` down to `max_norm`."""
    if max_norm is None or norm <= max_norm:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            fsdp.local(parameter.grad).mul_(max_norm / norm)


def snapshot(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Copies of this rank's parameters, to measure several updates against."""
    return [parameter.detach().clone() for parameter in parameters]


def distance(before: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> float:
    """L2 norm of the change since `snapshot`; a collective."""
    changes = (now.detach() - old for now, old in zip(parameters, before, strict=True))
    return global_norm(changes, copies=fsdp.copies(parameters[0]))


def global_norm(tensors: Iterable[Tensor], *, copies: int) -> float:
    """L2 norm over tensors of which `copies` ranks each hold the same part, summed in float64; a collective."""
    return norm_over_ranks(square_sum(tensors), copies)


def square_sum(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of the squares of this rank's elements, in float64; no collective."""
    squares = [torch.linalg.vector_norm(chunk, dtype=torch.float64).square() for chunk in _chunks(tensors)]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)


def _chunks(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """This rank's elements, `CHUNK` at a time: a kernel for each of a thousand adapter matrices would be slow."""
    held: list[Tensor] = []
    room = CHUNK
    for tensor in tensors:
        for part in fsdp.local(tensor).reshape(-1).split(CHUNK):
            if len(part) > room:
                yield torch.cat(held)
                held, room = [], CHUNK
            held.append(part)
            room -= len(part)
    if held:
        yield torch.cat(held)


def norm_over_ranks(square_sum: Tensor, copies: int) -> float:
    """L2 norm from the sum of squares of each rank's parts, of which `copies` ranks each hold the same; a collective."""
    total = fsdp.sum_over_ranks(square_sum.detach().to("cpu", torch.float64, copy=True))
    return math.sqrt(float(total) / copies)
