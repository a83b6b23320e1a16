"""The gradient of the user's loss through the model's code, beside central differences in float64.

Along a unit vector v the two must agree: g . v = (L(w + h v) - L(w - h v)) / 2h + O(h^2). What L is, is the code of a training
step: packing, forward pass, loss. Proximal log-probabilities are those from before, as in a step. `cispo` holds its weights fixed
in the gradient; L(w + h v) is taken with the weights at w.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn

from turnwise.config import RLConfig
from turnwise.diagnose.probe_report import Difference, Differences
from turnwise.diagnose.probing.small_copy import VOCABULARY, build_copy, in_double, small_config
from turnwise.diagnose.probing.subset import choose_samples, part_of
from turnwise.trainer.packing import MicroBatch, pack, step_totals
from turnwise.trainer.step import Learner, Passes
from turnwise.transport import NOT_SAMPLED, Batch, Sample

SAMPLES, TOKENS = 4, 48  # of the batch; the longest of a sample
OFF_POLICY = 0.3  # nats by which recorded logprobs differ from the copy's at most: some ratios are clipped, most are not
STEPS = (1e-3, 1e-4, 1e-5, 1e-6)  # lengths h; the best counts: within a longer one a ratio may cross a clipping bound
RANDOM = 2  # directions for each kind of tensor
SMALLEST = 1e-4  # of the gradient's length: what a smaller derivative along a direction is compared with

Group = Sequence[nn.Parameter]


def finite_differences(config: RLConfig, batch: Batch, folder: Path) -> Differences:
    """On a small copy that is put into `folder`; no collective. Says in `trouble` why an architecture cannot be copied."""
    try:
        learner = build_copy(small_config(config, folder))
        with in_double():
            return compare_directions(learner, batch)
    except Exception as error:  # any model of the hub may refuse another shape than its own; the other measurements go on
        return Differences(trouble=f"{type(error).__name__}: {error}")


def compare_directions(learner: Learner, batch: Batch) -> Differences:
    """Derivatives along random directions of each kind of tensor, and along its gradient."""
    objective = _Objective(_passes(learner, batch))
    objective.backward()
    generator = torch.Generator().manual_seed(1)
    found: list[Difference] = []
    for kind, group in kinds_of(learner.parameters).items():
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        for index in range(RANDOM):
            random = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in group]
            found.append(_difference(f"{kind}, random direction {index + 1}", objective, group, gradients, random))
        found.append(_difference(f"{kind}, along the gradient", objective, group, gradients, gradients))
    shape = learner.policy.model.config
    width = f"{shape.num_hidden_layers} layers of width {shape.hidden_size}"
    return Differences(found, copy=f"{type(learner.policy.model).__name__}, {width}, float64, random weights")


def kinds_of(parameters: Mapping[str, nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """Trained tensors by what they are for."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        found.setdefault(_kind(name), []).append(parameter)
    return found


def _kind(name: str) -> str:
    if name.endswith((".lora_A", ".lora_B")):
        return f"LoRA {name[-1]}"
    marks = {"norm": "norms", "attn": "attention", "mlp": "feed-forward", "experts": "feed-forward"}
    return next((kind for mark, kind in marks.items() if mark in name), "embeddings")


class _Objective:
    """The loss as a function of the copy's weights."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.detached = passes.loss_config.kind == "cispo"  # its weights are no part of what is differentiated
        self.start = [self._logprobs(part) for part in passes.micro_batches] if self.detached else []

    def backward(self) -> None:
        """Gradients, and the proximal log-probabilities."""
        for index, part in enumerate(self.passes.micro_batches):
            self.passes.loss(index, part, first=True)[0].backward()
        self.proximal = dict(self.passes.proximal)

    def value(self) -> float:
        """The loss, with what a step holds fixed as it was."""
        total = 0.0
        with torch.no_grad():
            for index, part in enumerate(self.passes.micro_batches):
                if self.detached:  # ratios stay the same where both policies of a ratio move together
                    moved = self._logprobs(part) - self.start[index]
                    part = replace(part, behaviour_logprobs=part.behaviour_logprobs + moved)
                    self.passes.proximal = {i: values + moved for i, values in self.proximal.items() if i == index}
                total += float(self.passes.loss(index, part, first=False)[0])
        return total

    def _logprobs(self, part: MicroBatch) -> Tensor:
        with torch.no_grad():
            return self.passes.learner.policy.stats(part, temperature=self.passes.temperature).logprobs


def _passes(learner: Learner, batch: Batch) -> Passes:
    """Passes over a few short samples of the batch, as if a policy near to the copy had sampled them."""
    samples = [_short(sample) for sample in choose_samples(batch.samples, tokens=SAMPLES * TOKENS, most=SAMPLES)]
    short = part_of(batch, samples)
    (parts,) = pack(samples, max_tokens=2 * TOKENS)
    generator = torch.Generator().manual_seed(0)
    near: list[MicroBatch] = []
    with torch.no_grad():
        for part in parts:
            own = learner.policy.stats(part, temperature=batch.temperature).logprobs
            noise = OFF_POLICY * (2 * torch.rand(own.shape, generator=generator, dtype=own.dtype) - 1)
            near.append(replace(part, behaviour_logprobs=own + noise, advantages=part.advantages.to(own.dtype)))
    return Passes(learner, short, near, step_totals(samples))


def _short(sample: Sample) -> Sample:
    """A part of a sample with its first sampled tokens that have an advantage, in the copy's vocabulary."""
    first = next(i for i, advantage in enumerate(sample.advantages) if advantage)
    begin = max(0, first - TOKENS // 2)
    window = slice(begin, begin + TOKENS)
    mask = [chosen and place > 0 for place, chosen in enumerate(sample.loss_mask[window])]
    versions = [version if chosen else NOT_SAMPLED for version, chosen in zip(sample.policy_versions[window], mask, strict=True)]
    return msgspec.structs.replace(
        sample,
        token_ids=[token % VOCABULARY for token in sample.token_ids[window]],
        loss_mask=mask,
        logprobs=sample.logprobs[window],
        advantages=sample.advantages[window],
        policy_versions=versions,
        rollout_tokens=sum(mask),
    )


def _difference(
    name: str, objective: _Objective, group: Group, gradients: Sequence[Tensor], direction: Sequence[Tensor]
) -> Difference:
    size = _length(gradients)
    length = _length(direction)
    unit = [part / length if length > 0 else part for part in direction]
    autograd = float(sum((g * u).sum() for g, u in zip(gradients, unit, strict=True)))
    numeric = [_slope(objective, group, unit, step) for step in STEPS]
    errors = [relative_error(autograd, value, smallest=SMALLEST * size) for value in numeric]
    best = min(range(len(STEPS)), key=lambda i: math.inf if math.isnan(errors[i]) else errors[i])
    return Difference(name, autograd, numeric[best], errors[best])


def relative_error(a: float, b: float, *, smallest: float) -> float:
    """|a - b| in relation to the larger of the two, or to `smallest`."""
    scale = max(abs(a), abs(b), smallest)
    return abs(a - b) / scale if scale > 0 else 0.0


def _slope(objective: _Objective, group: Group, unit: Sequence[Tensor], step: float) -> float:
    """The central difference."""
    start = [parameter.detach().clone() for parameter in group]
    values: list[float] = []
    for sign in (1, -1):
        for parameter, origin, part in zip(group, start, unit, strict=True):
            parameter.detach().copy_(origin + sign * step * part)
        values.append(objective.value())
    for parameter, origin in zip(group, start, strict=True):
        parameter.detach().copy_(origin)
    return (values[0] - values[1]) / (2 * step)


def _length(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))
