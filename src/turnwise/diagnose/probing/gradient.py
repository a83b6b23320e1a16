"""Which tensors train, and what gradient reaches each of them."""

import time
from collections.abc import Mapping

import msgspec
import torch
from torch import nn

from turnwise.diagnose.probe_report import Gradient
from turnwise.diagnose.probing.subset import choose_samples, part_of
from turnwise.diagnose.probing.tensors import awake_adapter, expected_tensors, norms
from turnwise.trainer import fsdp
from turnwise.trainer.step import Learner, Passes
from turnwise.transport import Batch

FEW_SAMPLES, FEW_TOKENS = 4, 512  # show whether a gradient reaches a tensor at all


def measure_gradient(learner: Learner, passes: Passes, batch: Batch) -> Gradient:
    """Backward passes over the batch; a collective. Gradients stay, where anything trains, for an update.

    The first gradient of an adapter's A is exactly 0, since B is. It is judged by that of a few samples with another B.
    """
    expected, training = expected_tensors(learner), set(learner.policy.trainable())
    held = {id(parameter) for parameter in learner.optimizer.parameters}
    found = Gradient(
        expected=len(expected),
        frozen=sorted(expected - training),
        unexpected=sorted(training - expected),
        unheld=sorted(name for name, parameter in learner.policy.trainable().items() if id(parameter) not in held),
        max_norm=learner.config.trainer.optim.max_grad_norm,
    )
    if not training or not learner.trained:
        return found
    began = time.perf_counter()
    metrics = passes.backward(first=True)
    seconds = time.perf_counter() - began
    missing = _without_gradient(learner.parameters)
    others = {name: p for name, p in learner.policy.model.named_parameters() if name not in learner.parameters}
    stray = [name for name, parameter in others.items() if parameter.grad is not None]
    norm = learner.reduce_gradients()
    return msgspec.structs.replace(
        found,
        missing=missing,
        stray=stray,
        norms=_norms(learner),
        awake=_awake_norms(learner, passes, batch) if learner.lora is not None else {},
        norm=norm,
        loss=metrics["actor/loss"],
        seconds=seconds,
    )


def _without_gradient(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Names of those without one on every rank; a collective."""
    there = torch.tensor([parameter.grad is not None for parameter in parameters.values()], dtype=torch.int64)
    return [name for name, ranks in zip(parameters, fsdp.sum_over_ranks(there).tolist(), strict=True) if not ranks]


def _norms(learner: Learner) -> dict[str, float]:
    return dict(zip(learner.parameters, norms([parameter.grad for parameter in learner.trained]), strict=True))


def _awake_norms(learner: Learner, passes: Passes, batch: Batch) -> dict[str, float]:
    """Gradient norms of the adapter when B is not 0; a collective."""
    few = learner.passes(part_of(batch, choose_samples(batch.samples, tokens=FEW_TOKENS, most=FEW_SAMPLES)))
    found: dict[str, float] = {}
    for several in (few, passes):  # of a few tokens clipping may leave nothing
        with awake_adapter(learner):
            several.backward(first=True)
            learner.reduce_gradients()
            found = _norms(learner)
        if any(found.values()):
            break
    return found
