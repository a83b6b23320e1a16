"""What a run has measured so far that says whether it learns, and simple summaries of it."""

import bisect
import math
from collections.abc import Mapping
from statistics import fmean, median

from turnwise.monitor.held_out import Comparison, evaluations
from turnwise.monitor.history import History

REWARD, SPREAD = "critic/reward/mean", "critic/reward/std"
BEST, WORST = "critic/reward/max", "critic/reward/min"
EQUAL = "groups/equal_reward/share"
COMMON_REPLY = "rollouts/common_reply/share"
LOSS, ENTROPY, KL, MISMATCH = "actor/loss", "actor/entropy", "actor/kl", "mismatch/kl/mean"
GRADIENT, CLIPPED = "actor/grad_norm", "actor/grad_clipped/share"
UPDATE, UPDATE_RATIO, LEARNING_RATE = "actor/update_norm", "actor/update_ratio", "actor/lr"
PUBLISHED_CHANGE = "actor/published_change/share"
REWARDED = "actor/rewarded_logprob_change"
NONFINITE = "monitor/nonfinite/count"
SIGMA = "noise/sigma"

KEPT = frozenset(
    [
        *(REWARD, SPREAD, BEST, WORST, EQUAL, COMMON_REPLY, ENTROPY, KL, MISMATCH, GRADIENT, CLIPPED),
        *(UPDATE, UPDATE_RATIO, LEARNING_RATE, PUBLISHED_CHANGE, REWARDED, SIGMA),
    ]
)
FEWEST_RECENT, MOST_RECENT = 5, 20  # steps that stand for "now": a quarter of the run, between these


def is_of_training(metrics: Mapping[str, object]) -> bool:
    """Whether a line of metrics.jsonl is that of a step, and not of an evaluation alone."""
    return REWARD in metrics or LEARNING_RATE in metrics


class Facts:
    """Metrics of a run by name and step. A later value of a step replaces the earlier, as after a resume."""

    def __init__(self) -> None:
        self._history = History(window=1)
        self._training: list[int] = []  # ascending
        self._broken: set[int] = set()  # steps whose loss or gradient was not finite
        self._evaluations: dict[int, Mapping[str, float]] = {}

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in metrics of a step; several calls a step are fine. NaN stands for what was not finite."""
        for name in KEPT & metrics.keys():
            self._history.record(step, name, float(metrics[name]))
        evaluation = {name: float(value) for name, value in metrics.items() if name.startswith("val-")}
        if evaluation:
            self._evaluations[step] = evaluation
        if is_of_training(metrics):
            self._note_training(step)
            self._note_broken(step, metrics)

    def _note_training(self, step: int) -> None:
        place = bisect.bisect_left(self._training, step)
        if place == len(self._training) or self._training[place] != step:
            self._training.insert(place, step)

    def _note_broken(self, step: int, metrics: Mapping[str, float]) -> None:
        """metrics.jsonl has null for what was not finite, which readers leave out, and a count."""
        values = [float(metrics[name]) for name in (LOSS, GRADIENT) if name in metrics]
        missing = bool(metrics.get(NONFINITE)) and LEARNING_RATE in metrics and len(values) < 2
        if missing or not all(map(math.isfinite, values)):
            self._broken.add(step)
        else:
            self._broken.discard(step)

    @property
    def steps(self) -> int:
        """Training steps on record."""
        return len(self._training)

    @property
    def last_step(self) -> int:
        return max([*self._training[-1:], *self._evaluations], default=0)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and finite values, oldest first."""
        return self._history.series(name)

    @property
    def window(self) -> int:
        """Steps that stand for the present."""
        return min(MOST_RECENT, max(FEWEST_RECENT, self.steps // 4))

    def recent_steps(self) -> list[int]:
        return self._training[-self.window :]

    def recent(self, name: str) -> list[float]:
        """Values of the present; empty unless at least half of its steps, and as many as stand for it at least, have one."""
        chosen = self.recent_steps()
        found = self._history.at(name, chosen)
        return found if len(found) >= max(FEWEST_RECENT, len(chosen) / 2) else []

    def early(self, name: str) -> list[float]:
        """Values of the first steps, as many as stand for the present; empty while the two overlap."""
        overlap = self.steps < 2 * self.window
        return [] if overlap else self._history.at(name, self._training[: self.window])

    def broken_recently(self) -> int:
        """Steps of the present whose loss or gradient was not finite."""
        return len(self._broken & set(self.recent_steps()))

    def spread(self) -> float | None:
        """Standard deviation of the rewards of single rollouts: what a difference of rewards is measured by."""
        values = self.series(SPREAD)[1]
        return math.sqrt(fmean([value**2 for value in values])) if values else None

    def held_out(self) -> Comparison | None:
        """Evaluations on held-out tasks; None where there are not two to compare."""
        return Comparison.of(evaluations(self._evaluations))


def mean(values: list[float]) -> float | None:
    """None without values."""
    return fmean(values) if values else None


def middle(values: list[float]) -> float | None:
    """The median; None without values."""
    return median(values) if values else None


def share(values: list[float], wanted: float) -> float:
    """Share of the values that equal one."""
    return sum(value == wanted for value in values) / len(values) if values else 0.0
