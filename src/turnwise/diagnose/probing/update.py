"""One optimiser step at the learning rate of the configuration, and what of it arrives where."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turnwise.diagnose.probe_report import Counted, Merged, Update
from turnwise.diagnose.probing.tensors import host_copies
from turnwise.kernels.mxfp4.layer import MXFP4Linear
from turnwise.trainer import fsdp
from turnwise.trainer.lora_layer import LoraLinear
from turnwise.trainer.optim import learning_rate
from turnwise.trainer.publish import engine_dtype
from turnwise.trainer.step import Learner

CHUNK = 1 << 23  # elements that are compared at a time: some of the intermediate results are float64
AFTER = (1, 10, 100, 1000)  # steps of which it is counted what reaches engines: rounded masters begin on the numbers of that type
MERGED_LAYERS = 8  # of which it is looked what an adapter amounts to


@dataclass(frozen=True)
class Step:
    """A step that was taken."""

    update: Update
    before: list[Tensor]  # this rank's part of each trained tensor, on the CPU
    predicted: float  # change of the loss to first order: gradient before clipping . change of the weights


def take_step(learner: Learner, norm: float) -> Step:
    """Apply the gradients that are there, whose norm this is; a collective."""
    config = learner.config
    optim = config.trainer.optim
    number = max(1, optim.warmup_steps)
    lr = learner.set_learning_rate(number)
    before = host_copies(learner.trained)
    applied = learner.apply_gradients(norm) is not None
    tables = _compare_all(learner, before)
    learner.optimizer.zero_grad()
    clipped = min(1.0, optim.max_grad_norm / norm) if optim.max_grad_norm is not None and norm > 0 else 1.0
    weights = sum(table.weights for table in tables.values())
    update = Update(
        lr=lr,
        first_lr=learning_rate(optim, 1, config.max_steps),
        after_warmup=number,
        steps=config.max_steps,
        full_steps=_full_steps(learner, lr),
        applied=applied,
        norm=sum(table.change for table in tables.values()) ** 0.5,
        finite=all(table.strange == 0 for table in tables.values()),
        ratios={name: (table.change / table.size) ** 0.5 for name, table in tables.items() if table.size > 0},
        still=[name for name, table in tables.items() if table.weights > 0 and not table.changed],
        weights=round(weights),
        changed=round(sum(table.changed for table in tables.values())),
        published=[Counted(k, round(sum(t.published[i] for t in tables.values()))) for i, k in enumerate(AFTER)],
        step_share=sum(table.moved for table in tables.values()) / (lr * weights) if lr > 0 and weights else 0.0,
        merged=_merged(learner),
    )
    return Step(update, before, sum(table.slope for table in tables.values()) / clipped)


@dataclass(frozen=True)
class Columns:
    """Of one tensor, summed over its elements."""

    size: float  # squares of the weights before
    change: float  # squares of the change
    moved: float  # absolute change, where there is a gradient
    slope: float  # clipped gradient . change
    weights: float  # with a gradient that is not 0
    changed: float  # of those, another number than before
    strange: float  # not finite
    published: list[float]  # those that are another number in the published type, after each of `AFTER` such steps


def _compare_all(learner: Learner, before: Sequence[Tensor]) -> dict[str, Columns]:
    """Every tensor with what it was; a collective."""
    rows = [_compare(learner, name, old) for name, old in zip(learner.parameters, before, strict=True)]
    sums = fsdp.sum_over_ranks(torch.stack(rows)).tolist()
    split = -len(AFTER)
    return {name: Columns(*row[:split], published=row[split:]) for name, row in zip(learner.parameters, sums, strict=True)}


def _compare(learner: Learner, name: str, old: Tensor) -> Tensor:
    """The columns of a tensor, this rank's share of their sums over ranks; float64."""
    parameter = learner.parameters[name]
    now = fsdp.local(parameter.detach())
    gradient = torch.zeros_like(now) if parameter.grad is None else fsdp.local(parameter.grad)
    rows = max(1, CHUNK // max(1, now[:1].numel()))
    parts = [slice(start, start + rows) for start in range(0, len(now), rows)] or [slice(0)]
    columns = [_columns(learner, name, old[part].to(now.device), now[part], gradient[part]) for part in parts]
    return torch.stack(columns).sum(0) / fsdp.copies(parameter)


def _columns(learner: Learner, name: str, before: Tensor, now: Tensor, gradient: Tensor) -> Tensor:
    change, alive = (now - before).double(), gradient != 0
    served = _published(learner, name, before)
    values = [
        before.double().square().sum(),
        change.square().sum(),
        (change * alive).abs().sum(),
        (gradient.double() * change).sum(),
        alive.sum(),
        ((change != 0) & alive).sum(),
        (~torch.isfinite(now)).sum(),
    ]
    for steps in AFTER:
        later = now if steps == 1 else before + steps * (now - before)
        values.append(((_published(learner, name, later) != served) & alive).sum())
    return torch.stack([value.double() for value in values]).cpu()


def _published(learner: Learner, name: str, tensor: Tensor) -> Tensor:
    """What engines read of this rank's rows; blocks of quantisation lie within rows."""
    read = tensor.to(engine_dtype(learner))
    return read if learner.fake_quant is None or not read.numel() else learner.fake_quant.served(name, read)


def _full_steps(learner: Learner, lr: float) -> float | None:
    """Steps of the whole run, each weighed with its learning rate over `lr`."""
    steps = learner.config.max_steps
    if steps is None or lr <= 0:
        return None
    return sum(learning_rate(learner.config.trainer.optim, step, steps) for step in range(1, steps + 1)) / lr


def _merged(learner: Learner) -> Merged | None:
    """Some layers' updates beside their weights; a collective. None without an adapter on weights that can be read."""
    layers = [module for module in learner.policy.modules() if isinstance(module, LoraLinear)]
    ratios: list[float] = []
    changed = weights = 0
    for layer in layers[:: max(1, len(layers) // MERGED_LAYERS)][:MERGED_LAYERS]:
        base = _base_weight(layer)
        if base is None:
            continue
        delta = layer.scale * (fsdp.full(layer.lora_B) @ fsdp.full(layer.lora_A))
        ratios.append(float(torch.linalg.vector_norm(delta) / torch.linalg.vector_norm(base.float())))
        changed += int(((base.float() + delta).to(base.dtype) != base).sum())
        weights += base.numel()
    return Merged(sorted(ratios)[len(ratios) // 2], changed, weights) if ratios else None


def _base_weight(layer: LoraLinear) -> Tensor | None:
    """The whole weight under an adapter, decoded where it is packed; None where packed weights are sharded."""
    if type(layer.base) is MXFP4Linear:
        return layer.base.dequantize()
    if isinstance(layer.base, MXFP4Linear):
        return None
    return fsdp.full(layer.base.weight)
