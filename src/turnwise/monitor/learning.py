"""One verdict about a run, from its metrics alone: learning, flat, collapsing, no signal, or too early to say.

- learning: the reward is higher than at the start beyond its own noise, and at least half of the best gain is kept.
- collapsing: it has lost more than half of its best gain beyond noise; or numbers are not finite, replies have become one,
  entropy is gone without a gain, or policies that should be one are far apart.
- no signal: no gradient, no update, or nothing of it in the published weights.
- flat: none of these, over enough steps that a rise worth having would have shown.

Held-out evaluations count more than training rewards: a fall or a rise there decides.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from turnwise.monitor import facts as names
from turnwise.monitor import symptoms
from turnwise.monitor.facts import Facts
from turnwise.monitor.held_out import Comparison
from turnwise.monitor.symptoms import Symptom, first_of
from turnwise.monitor.trend import Shift, Trend, trend

STATE, RISE = "monitor/learning/state", "monitor/learning/rise"
FEWEST_FLAT = 20  # steps before a run is called flat
FLAT_WITHOUT_SPREAD = 30  # the same where the spread of rewards is not known
WORTH_SEEING = 0.5  # of the spread of single rewards: a rise that must have shown before a run is called flat
LEAST_FALL = 0.2  # of the spread of single rewards: less is no collapse
NOTHING_FOUND = "no probe says why: try more steps, a higher trainer.optim.lr, or easier tasks; run `turnwise check`"
LEVEL_STEPS = 20  # without a further rise that are worth a word


class State(StrEnum):
    """What a run does."""

    LEARNING = "learning"
    FLAT = "flat"
    COLLAPSING = "collapsing"
    NO_SIGNAL = "no signal"
    TOO_EARLY = "too early"


CODES = {State.LEARNING: 1.0, State.FLAT: 0.0, State.COLLAPSING: -1.0, State.NO_SIGNAL: -2.0}


@dataclass(frozen=True)
class Learning:
    """The verdict, a reason with numbers that can follow a colon, and what to do, where something is to be done."""

    state: State
    reason: str
    remedy: str = ""
    step: int = 0
    reward: Trend | None = None  # of the training reward

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}"

    @property
    def line(self) -> str:
        """`Verdict at step 60: learning: the reward rose from ...`"""
        return f"Verdict at step {self.step}: {self}"

    def as_dict(self) -> dict[str, str | int]:
        """For JSON."""
        return {"state": str(self.state), "reason": self.reason, "remedy": self.remedy, "step": self.step}

    def metrics(self) -> dict[str, float]:
        """For metrics.jsonl and conditions; nothing while it is too early."""
        found = {STATE: CODES[self.state]} if self.state in CODES else {}
        if self.reward is not None and math.isfinite(self.reward.rise.errors):
            found[RISE] = self.reward.rise.errors
        return found


class LearningWatch:
    """Takes in a run's metrics step by step and judges it when asked."""

    def __init__(self) -> None:
        self._facts = Facts()
        self._verdict: Learning | None = None

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Several calls a step are fine; a later value of a step replaces the earlier."""
        self._facts.record(step, metrics)
        self._verdict = None

    @property
    def verdict(self) -> Learning:
        """Of what was recorded so far; a millisecond, and kept."""
        if self._verdict is None:
            self._verdict = judge(self._facts)
        return self._verdict


def judge_metrics(metrics: Mapping[int, Mapping[str, float]]) -> Learning:
    """The verdict on a run whose metrics are known by step."""
    facts = Facts()
    for step, values in metrics.items():
        facts.record(step, values)
    return judge(facts)


def judge(facts: Facts) -> Learning:
    """The verdict."""
    reward = trend(*facts.series(names.REWARD), least_fall=LEAST_FALL * (facts.spread() or 0.0))
    held_out = facts.held_out()
    state, symptom = _decide(facts, reward, held_out)
    return Learning(state, symptom.evidence, symptom.remedy, facts.last_step, reward)


def _decide(facts: Facts, reward: Trend | None, held_out: Comparison | None) -> tuple[State, Symptom]:
    if (found := _collapse(facts, reward, held_out)) is not None:
        return State.COLLAPSING, found
    if (found := _gain(facts, reward, held_out)) is not None:
        return State.LEARNING, found
    if (found := first_of(symptoms.NO_SIGNAL, facts)) is not None:
        return State.NO_SIGNAL, found
    if (found := symptoms.no_entropy(facts)) is not None:
        return State.COLLAPSING, found
    if (found := _uncertain(facts, reward, held_out)) is not None:
        return State.TOO_EARLY, found
    return State.FLAT, _flat(facts, reward, held_out)


def _collapse(facts: Facts, reward: Trend | None, held_out: Comparison | None) -> Symptom | None:
    if (found := first_of(symptoms.COLLAPSES, facts)) is not None:
        return found
    if held_out is not None and held_out.fell:
        return Symptom(f"the held-out reward fell {held_out.told(from_best=True)}", symptoms.GO_BACK)
    if reward is None or not reward.fell or reward.fall is None:
        return None
    if held_out is not None and held_out.rose and held_out.last.step >= reward.fall.steps_after[0]:
        return None  # harder tasks may have come; the tasks of evaluations stay the same
    return Symptom(f"the reward fell {_told(reward.fall)}", symptoms.GO_BACK)


def _gain(facts: Facts, reward: Trend | None, held_out: Comparison | None) -> Symptom | None:
    parts: list[str] = []
    if held_out is not None and held_out.rose:
        parts.append(f"the held-out reward rose {held_out.told()}")
    if reward is not None and reward.rose:
        parts.append(f"the {'training ' if parts else ''}reward rose {_told(reward.rise)}")
    if not parts:
        return None
    if held_out is not None and not held_out.rose:
        parts.append(f"the held-out reward has not changed beyond chance: {held_out.told()}")
    parts += [f"now {found.evidence}" for found in [first_of((*symptoms.NO_SIGNAL, symptoms.no_entropy), facts)] if found]
    parts += _level(facts)
    return Symptom("; ".join(parts), "")


def _level(facts: Facts) -> list[str]:
    """Whether the second half of the run has brought nothing more."""
    steps, values = facts.series(names.REWARD)
    half = len(steps) // 2
    later = trend(steps[half:], values[half:]) if half >= LEVEL_STEPS else None
    return [] if later is None or later.rose else [f"no further rise since step {steps[half]}"]


def _uncertain(facts: Facts, reward: Trend | None, held_out: Comparison | None) -> Symptom | None:
    """Too few steps to have seen a rise worth having."""
    if facts.steps == 0 and held_out is not None:
        return None
    if reward is None or reward.values < FEWEST_FLAT:
        return Symptom(f"{facts.steps} steps so far" if facts.steps else "no step so far", "")
    spread = facts.spread()
    if spread is None:
        return None if reward.values >= FLAT_WITHOUT_SPREAD else Symptom(f"{facts.steps} steps so far", "")
    if reward.detectable <= WORTH_SEEING * spread:
        return None
    return Symptom(f"{facts.steps} steps so far, in which only a rise of {reward.detectable:.2g} would show", "")


def _flat(facts: Facts, reward: Trend | None, held_out: Comparison | None) -> Symptom:
    parts: list[str] = []
    if reward is not None:
        parts.append(
            f"the reward was {reward.first:.3g} over the first third of {reward.values} steps and {reward.last:.3g} over the "
            f"last, where a rise of {reward.detectable:.2g} would have shown"
        )
    if held_out is not None:
        parts.append(f"the held-out reward has not changed beyond chance: {held_out.told()}")
    why = first_of(symptoms.REASONS_FOR_FLAT, facts)
    parts += [why.evidence] if why else []
    return Symptom("; ".join(parts), why.remedy if why else NOTHING_FOUND)


def _told(shift: Shift) -> str:
    """`from 0.21 (steps 1 to 20) to 0.63 (steps 101 to 120), 9.2 standard errors`"""
    (a, b), (c, d) = shift.steps_before, shift.steps_after
    errors = f"{abs(shift.errors):.1f} standard errors" if math.isfinite(shift.errors) else "without any noise"
    return f"from {shift.before:.3g} (steps {a} to {b}) to {shift.after:.3g} (steps {c} to {d}), {errors}"
