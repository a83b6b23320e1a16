"""When a run has succeeded, and when it is hopeless: the `[stop]` table, judged after every step."""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from turnwise.config import StopConfig
from turnwise.monitor.expressions import Expression
from turnwise.monitor.facts import REWARD
from turnwise.monitor.history import History, numbers
from turnwise.monitor.learning import CODES, STATE, Learning, LearningWatch, State

COLLAPSE = "collapse"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What a step decided about the run."""

    kind: Literal["success", "abort"]
    reason: str


class Conditions:
    """Judges a run by its metrics, step by step.

    `first_success` is the first step at which `success_when` held. `warnings` are (step, text), each trouble once until it
    has passed; with `on_stuck = "stop"` they are abort verdicts instead. Expressions may name the metrics of `learning`.

    Raises:
        ExpressionError: a condition of the table is not an expression over metrics.
    """

    def __init__(self, stop: StopConfig) -> None:
        self.stop = stop
        self.first_success: int | None = None
        self.warnings: list[tuple[int, str]] = []
        self._success = None if stop.success_when is None else Expression(stop.success_when)
        self._abort = None if stop.abort_when is None else Expression(stop.abort_when)
        self._history = History(stop.window)
        self._named: set[str] = set().union(*(e.names for e in (self._success, self._abort) if e))
        self._seen: set[str] = set()
        self._names_checked = False
        self._troubles: set[str] = set()  # names of troubles reported and not passed
        self._watch = LearningWatch()
        self._best: float = -math.inf  # best running mean of the reward so far, and its step
        self._best_step = 0
        self._collapsing_since: int | None = None  # first step of those in a row at which the verdict was so

    @property
    def learning(self) -> Learning:
        """What the run does, by what was taken in so far."""
        return self._watch.verdict

    def update(self, step: int, metrics: Mapping[str, float]) -> Verdict | None:
        """Take the metrics of a step (several calls a step are fine) and judge.

        Success is returned once, at the first step where it holds; an abort at every step where it holds.
        """
        seen = len(self.warnings)
        self._watch.record(step, metrics)
        verdict = self._judge(step, {**metrics, **self.learning.metrics()})
        for _, text in self.warnings[seen:]:
            logger.warning("step %d: %s", step, text)
        return verdict

    def replay(self, lines: Iterable[str | bytes | Mapping[str, Any]]) -> None:
        """Restore the state from the lines of metrics.jsonl at a resume; what they led to is not reported again."""
        for line in lines:
            record: Mapping[str, Any] = line if isinstance(line, Mapping) else json.loads(line)
            metrics = numbers(record)
            self._watch.record(int(record["step"]), metrics)
            self._judge(int(record["step"]), metrics)

    def _judge(self, step: int, metrics: Mapping[str, float]) -> Verdict | None:
        self._record(step, metrics)
        if self._success and self.first_success is None and self._success.holds(self._history):
            self.first_success = step
            return Verdict("success", f"success_when holds from step {step}: {self._success.text}")
        if self._abort and self._abort.holds(self._history):
            return Verdict("abort", f"abort_when holds at step {step}: {self._abort.text}")
        fresh = self._fresh_troubles(step)
        if fresh and self.stop.on_stuck == "stop":
            return Verdict("abort", "; ".join(fresh))
        self.warnings += [(step, text) for text in fresh + self._missing_metrics(step)]
        return None

    def _record(self, step: int, metrics: Mapping[str, float]) -> None:
        self._history.step = max(step, self._history.step)
        self._seen.update(metrics)
        for name in ({REWARD} | self._named) & metrics.keys():
            self._history.record(step, name, float(metrics[name]))
        mean = self._history.running_mean(REWARD)
        if mean is not None and mean > self._best:
            self._best, self._best_step = mean, step
        if STATE in metrics or REWARD in metrics:  # a line of an evaluation alone, read again, has no verdict
            collapsing = metrics.get(STATE) == CODES[State.COLLAPSING]
            self._collapsing_since = (self._collapsing_since or step) if collapsing else None

    def _fresh_troubles(self, step: int) -> list[str]:
        """Troubles of this step that were not there at the last one."""
        found = {"stuck": self._stuck(step), COLLAPSE: self._collapse(step)}
        fresh = [text for name, text in found.items() if text is not None and name not in self._troubles]
        passed = self.learning.state is State.LEARNING if COLLAPSE in self._troubles else True
        self._troubles = {name for name, text in found.items() if text is not None} | (set() if passed else {COLLAPSE})
        return fresh

    def _stuck(self, step: int) -> str | None:
        if self.stop.patience is None or math.isinf(self._best) or step - self._best_step < self.stop.patience:
            return None
        return (
            f"stuck: the running mean of the reward has not risen above {self._best:.4g} (step {self._best_step}) "
            f"for {self.stop.patience} steps; see the warnings of report.md, or raise stop.patience"
        )

    def _collapse(self, step: int) -> str | None:
        """The verdict, once it has stood for `window` steps: noise alone may bring it about for a few."""
        if self._collapsing_since is None or step - self._collapsing_since + 1 < self.stop.window:
            return None
        return f"{self.learning}; {self.learning.remedy}"

    def _missing_metrics(self, step: int) -> list[str]:
        if step < self.stop.window or self._names_checked:
            return []
        self._names_checked = True  # once, when every metric of a step has had the time to come by
        names = sorted(self._named - self._seen)
        return [f"[stop] names {name}, which this run has not reported so far: what depends on it cannot hold" for name in names]
