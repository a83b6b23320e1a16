"""Held-out evaluations compared: the first with the last, and the best with the last."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

START, END = "val-core/", "/reward/mean"
ROLLOUTS_START, ROLLOUTS_END = "val-aux/", "/rollouts/count"
RISE_ERRORS = 3.0  # standard errors between two evaluations
FALL_ERRORS = 4.0  # the same from the best of several


@dataclass(frozen=True)
class HeldOut:
    """An evaluation: the mean reward over environments."""

    step: int
    reward: float
    error: float | None  # its standard error over tasks, where that is known
    rollouts: float | None


def evaluations(by_step: Mapping[int, Mapping[str, float]]) -> list[HeldOut]:
    """The evaluations among metrics, oldest first; those that lack an environment that others have are left out."""
    rewards = {step: _rewards(values) for step, values in sorted(by_step.items())}
    whole = max(map(len, rewards.values()), default=0)
    return [_evaluation(step, by_step[step], found) for step, found in rewards.items() if 0 < len(found) == whole]


def _rewards(values: Mapping[str, float]) -> dict[str, float]:
    chosen = {name: value for name, value in values.items() if name.startswith(START) and name.endswith(END)}
    return {name.removesuffix("mean"): value for name, value in chosen.items() if math.isfinite(value)}


def _evaluation(step: int, values: Mapping[str, float], rewards: Mapping[str, float]) -> HeldOut:
    errors = [values.get(f"{name}stderr", math.nan) for name in rewards]
    counts = [value for name, value in values.items() if name.startswith(ROLLOUTS_START) and name.endswith(ROLLOUTS_END)]
    error = math.hypot(*errors) / len(errors)
    return HeldOut(step, fmean(rewards.values()), error if math.isfinite(error) else None, sum(counts) if counts else None)


@dataclass(frozen=True)
class Comparison:
    """Three evaluations. Their errors are taken as independent: on the same tasks the true ones are smaller."""

    first: HeldOut
    best: HeldOut
    last: HeldOut

    @classmethod
    def of(cls, found: Sequence[HeldOut]) -> "Comparison | None":
        """None where there are not two whose standard error is known."""
        known = [one for one in found if one.error is not None]
        return cls(known[0], max(known, key=lambda one: one.reward), known[-1]) if len(known) > 1 else None

    @property
    def rose(self) -> bool:
        return errors_between(self.first, self.last) >= RISE_ERRORS

    @property
    def fell(self) -> bool:
        """From the start, or from the best by half of what had been gained."""
        lost, gained = self.best.reward - self.last.reward, self.best.reward - self.first.reward
        from_best = -errors_between(self.best, self.last) >= FALL_ERRORS and lost >= gained / 2
        return from_best or -errors_between(self.first, self.last) >= RISE_ERRORS

    def told(self, *, from_best: bool = False) -> str:
        """`from 0.31 at step 0 to 0.52 at step 100 (+6.1 standard errors)`"""
        start = self.best if from_best else self.first
        return (
            f"from {start.reward:.3g} at step {start.step} to {self.last.reward:.3g} at step {self.last.step} "
            f"({errors_between(start, self.last):+.1f} standard errors)"
        )


def errors_between(one: HeldOut, other: HeldOut) -> float:
    """The difference in its standard errors; 0 where those are not known.

    Rollouts that all got one reward show no spread, which is no proof that there is none: their error is taken as the difference
    over the root of their number, so that nine of them on either side are too few to show anything, and eighteen are enough.
    """
    difference = other.reward - one.reward
    errors = [_error(evaluation, difference) for evaluation in (one, other)]
    total = math.hypot(*errors)
    return difference / total if difference and math.isfinite(total) and total > 0 else 0.0


def _error(evaluation: HeldOut, difference: float) -> float:
    if evaluation.error is None:
        return math.inf
    if evaluation.error > 0:
        return evaluation.error
    return abs(difference) / math.sqrt(evaluation.rollouts) if evaluation.rollouts else math.inf
