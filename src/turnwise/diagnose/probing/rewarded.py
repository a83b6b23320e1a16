"""What an update did to the tokens that were sampled: did those become likelier that led to more reward than others?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from turnwise.diagnose.probe_report import Counted, Rewarded, Scaled
from turnwise.diagnose.probing.tokens import Tokens, Vector, kl, loss_weights, measure
from turnwise.diagnose.trainer_checks.rewarded import SURE
from turnwise.trainer import fsdp
from turnwise.trainer.step import Learner, Passes

LONG = 10.0  # standard deviations of rounding that the expected change is to be
MOST_CHANGED = 0.5  # of the weights that a long step changes
LARGEST = 0.1  # nats a token, weighed: beyond, a longer step is no longer nearly linear
SMALLEST = 0.01  # nats a token, weighed, of a shorter step that is tried when the step went the wrong way


@dataclass(frozen=True)
class Effect:
    """The measured tokens, before the update."""

    tokens: Tokens
    before: Vector  # logprobs
    weights: Vector  # of each token in the loss
    rounding: float  # standard deviation of a logprob from rounding alone, nats

    @classmethod
    def of(cls, passes: Passes, tokens: Tokens, before: Vector) -> "Effect":
        """Rounding is taken for what engine and trainer differ by, who compute the same in different order."""
        most = passes.loss_config.max_completion_tokens or 1
        weights = loss_weights(tokens, kind=passes.loss_config.kind, max_completion_tokens=most)
        return cls(tokens, before, weights, float(np.std(before - tokens.engine)))

    def observed(self, after: Vector) -> float:
        return float(np.sum(self.weights * self.tokens.advantages * (after - self.before)))

    @property
    def noise(self) -> float:
        return self.rounding * float(np.sqrt(np.sum((self.weights * self.tokens.advantages) ** 2)))

    @property
    def scale(self) -> float:
        return float(np.sum(self.weights * np.abs(self.tokens.advantages)))


def measure_effect(effect: Effect, after: Vector, predicted: float) -> Rewarded:
    """Numbers of the update.

    Args:
        effect: of the tokens before it.
        after: their logprobs now.
        predicted: minus the change of the loss to first order.
    """
    change, advantages = after - effect.before, effect.tokens.advantages
    above, below = advantages > 0, advantages < 0
    return Rewarded(
        predicted=predicted,
        observed=effect.observed(after),
        noise=effect.noise,
        scale=effect.scale,
        positive=float(change[above].mean()) if above.any() else 0.0,
        negative=float(change[below].mean()) if below.any() else 0.0,
        positives=int(above.sum()),
        negatives=int(below.sum()),
        change=float(np.abs(change).mean()),
        kl=kl(after, effect.before),
    )


def better_factor(found: Rewarded, rounding: float, published: Sequence[Counted]) -> float:
    """How many times as long the step must be to show above rounding: of weights, of single tokens, and in the sum over them.

    Below 1 where it shows and went the wrong way, to see whether it was too long; 1 when it can be judged as it is, or no length
    would help.

    Args:
        rounding: standard deviation of a logprob, nats.
        published: weights that change in the type in which the policy computes, after so many such steps.
    """
    if found.predicted <= 0 or found.scale <= 0:
        return 1.0
    needed = max(LONG * found.noise, rounding * found.scale)
    most = max(count.changed for count in published)
    longer = float(next(count.steps for count in published if count.changed >= MOST_CHANGED * most))
    if found.predicted < needed:
        longer = max(longer, float(10.0 ** np.ceil(np.log10(needed / found.predicted))))
    if longer > 1:
        return max(1.0, min(longer, LARGEST * found.scale / found.predicted))
    if found.observed <= SURE * found.noise:
        return min(1.0, max(needed, SMALLEST * found.scale) / found.predicted)
    return 1.0


def scaled_effect(
    learner: Learner, passes: Passes, effect: Effect, before: list[Tensor], predicted: float, factor: float
) -> Scaled:
    """Make the update `factor` times as long, and measure again; a collective. The weights stay there.

    Args:
        before: this rank's parts of the trained tensors before the update.
        predicted: as in `measure_effect`, of the update as it is.
    """
    with torch.no_grad():
        for parameter, old in zip(learner.trained, before, strict=True):
            now = fsdp.local(parameter.detach())
            origin = old.to(now.device)
            now.copy_(origin + factor * (now - origin))
    after, _ = measure(learner, passes)
    return Scaled(factor, factor * predicted, effect.observed(after), kl(after, effect.before))
