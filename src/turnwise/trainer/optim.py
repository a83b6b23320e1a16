"""AdamW, its schedule, gradient clipping, and how far a step moved the parameters."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from turnwise.config import OptimConfig
from turnwise.trainer import fsdp


def learning_rate(config: OptimConfig, step: int, max_steps: int | None) -> float:
    """Learning rate of a step, counted from 1: warm-up to `lr`, then the schedule down to `min_lr_ratio * lr` at `max_steps`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    if config.schedule == "constant" or max_steps is None:
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with its moments in place, so that every checkpoint has the same entries."""
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


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


def global_norm(tensors: Iterable[Tensor]) -> float:
    """L2 norm over tensors that may be sharded, summed in float64; a collective."""
    parts = list(tensors)
    sharded = [part for part in parts if fsdp.is_sharded(part)]
    whole = [part for part in parts if not fsdp.is_sharded(part)]
    total = _square_sum(whole)
    if sharded:
        total += float(fsdp.sum_over_ranks(torch.tensor(_square_sum(sharded), dtype=torch.float64)))
    return math.sqrt(total)


def _square_sum(tensors: Iterable[Tensor]) -> float:
    return sum((float(fsdp.local(tensor).double().square().sum()) for tensor in tensors), 0.0)


def snapshot(parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """Copies of this rank's parameters, to measure an update against."""
    return [parameter.detach().clone() for parameter in parameters.values()]


def update_norm(before: list[Tensor], parameters: Mapping[str, nn.Parameter]) -> float:
    """L2 norm of the change since `snapshot`; a collective."""
    return global_norm([now.detach() - old for now, old in zip(parameters.values(), before, strict=True)])
