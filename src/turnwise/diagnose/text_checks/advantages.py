"""Do advantages say what the rewards say? Recomputed here from the formulas, one rollout at a time."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev

from turnwise.config import AdvantageConfig
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Check, Finding
from turnwise.diagnose.notes import Notes
from turnwise.orchestrator.advantage import FloatArray
from turnwise.orchestrator.filters import Fate, FinishedGroup, JudgedGroup
from turnwise.orchestrator.types import Rollout
from turnwise.transport import Sample

TINY = 1e-6  # the std below which `grpo` calls a group equal, and what it adds to others
TOLERANCE = 1e-6  # relative to the largest advantage of a group
FAINT_STD = 1e-3  # a std that is divided by: differences of a thousandth are rarely meant
OUTLIER = 30.0  # times the usual factor by which the std of a group scales it up


def look(context: Context) -> Finding:
    """Compare the advantages of groups and samples with what the rewards imply."""
    settings = context.config.orchestrator.advantage
    groups = [judged for judged in context.groups if judged.fate is Fate.SIGNAL]
    notes = Notes()
    _right_way(groups, notes, per_turn=settings.per_turn)
    difference = _as_recomputed(groups, settings, notes)
    if not settings.per_turn:
        _centred(groups, notes)
    if settings.kind == "grpo" and not settings.per_turn:
        _not_blown_up(groups, notes)
    _as_in_samples(groups, context.batch.samples, notes)
    sizes = [abs(float(value)) for judged in groups for values in judged.advantages for value in values]
    name = "per turn" if settings.per_turn else settings.kind
    data = {"kind": name, "groups": len(groups), "mean_abs": fmean(sizes), "max_abs": max(sizes), "difference": difference}
    summary = f"{len(groups)} groups recomputed ({name}): they agree, follow the rewards, |A| is {fmean(sizes):.3g} on average "
    return notes.finding(f"{summary}and {max(sizes):.3g} at most", data)


def expected_advantages(rollouts: Sequence[Rollout], config: AdvantageConfig) -> list[list[float]]:
    """Advantages of every turn of every rollout of a group, 0 for errored rollouts.

    `grpo`: arXiv 2402.03300, eq. 3 of section 4.1; `grpo_nostd`: arXiv 2503.20783; `rloo`: arXiv 2402.14740. Per turn: the return
    from a turn on less the mean return of the others from that turn, or from their last one, on.
    """
    valid = [rollout for rollout in rollouts if rollout.ok]
    if config.per_turn:
        return [_turns(rollout, [other for other in valid if other is not rollout]) for rollout in rollouts]
    rewards = [rollout.reward for rollout in valid]
    std = stdev(rewards)
    values: list[list[float]] = []
    for rollout in rollouts:
        away = rollout.reward - fmean(rewards)
        match config.kind:
            case "grpo":
                value = away / (std + TINY)
            case "grpo_nostd":
                value = away
            case "rloo":
                value = rollout.reward - (sum(rewards) - rollout.reward) / (len(rewards) - 1)
        values.append([value if rollout.ok and std >= TINY else 0.0] * len(rollout.turns))
    return values


def _turns(rollout: Rollout, others: Sequence[Rollout]) -> list[float]:
    if not rollout.ok:
        return [0.0] * len(rollout.turns)
    values: list[float] = []
    for turn in range(len(rollout.turns)):
        baseline = fmean(_return(other, min(turn, len(other.turns) - 1)) for other in others)
        values.append(_return(rollout, turn) - baseline)
    return values


def _return(rollout: Rollout, turn: int) -> float:
    return sum(paid.reward for paid in rollout.turns[turn:])


def _right_way(groups: Sequence[JudgedGroup], notes: Notes, *, per_turn: bool) -> None:
    """Whoever earned more than the others has the larger advantage."""
    against = [judged.group.id for judged in groups if _agreement(judged, per_turn=per_turn) < 0]
    if against:
        notes.fail(
            f"in {len(against)} of {len(groups)} groups advantages run against the rewards (group {against[0]}: "
            f"{_pairs(judged) if (judged := _first(groups, against)) else ''}): what was paid least would be reinforced"
        )


def _agreement(judged: JudgedGroup, *, per_turn: bool) -> float:
    """Sum of advantage times what was earned beyond the group's mean; positive for any advantages that follow the rewards.

    Earned: the reward of a rollout, or per turn the return from it on, where rollouts that have ended count with that of their
    last turn.
    """
    rows = [row for row in zip(judged.group.rollouts, judged.advantages, strict=True) if row[0].ok and row[0].turns]
    if not per_turn:
        mean = fmean(rollout.reward for rollout, _ in rows)
        return sum((rollout.reward - mean) * float(values[0]) for rollout, values in rows)
    total = 0.0
    for turn in range(max(len(rollout.turns) for rollout, _ in rows)):
        mean = fmean(_return(rollout, min(turn, len(rollout.turns) - 1)) for rollout, _ in rows)
        here = [(rollout, values) for rollout, values in rows if turn < len(rollout.turns)]
        total += sum((_return(rollout, turn) - mean) * float(values[turn]) for rollout, values in here)
    return total


def _first(groups: Sequence[JudgedGroup], ids: Sequence[int]) -> JudgedGroup | None:
    return next((judged for judged in groups if judged.group.id in ids), None)


def _pairs(judged: JudgedGroup) -> str:
    """`reward 1 -> -0.9`, for the best and the worst paid."""
    rows = [
        (rollout.reward, float(values[0]))
        for rollout, values in zip(judged.group.rollouts, judged.advantages, strict=True)
        if rollout.ok and len(values)
    ]
    return ", ".join(f"reward {reward:.3g} has {advantage:.3g}" for reward, advantage in (max(rows), min(rows)))


def _as_recomputed(groups: Sequence[JudgedGroup], config: AdvantageConfig, notes: Notes) -> float:
    """The largest difference from what the formulas give."""
    worst, where = 0.0, ""
    for judged in groups:
        expected = expected_advantages(judged.group.rollouts, config)
        scale = max([1.0, *(abs(value) for values in expected for value in values)])
        for rollout, values, given in zip(judged.group.rollouts, expected, judged.advantages, strict=True):
            for turn, value in enumerate(values):
                difference = abs(value - float(given[turn])) / scale
                if difference > worst:
                    worst, where = (
                        difference,
                        f"{rollout.rollout_id}, turn {turn}: {float(given[turn]):.4g} instead of {value:.4g}",
                    )
    if worst > TOLERANCE:
        notes.fail(f"advantages are not those of the formula ({where})")
    return worst


def _centred(groups: Sequence[JudgedGroup], notes: Notes) -> None:
    """Advantages of a group sum to 0, so that a group as a whole is neither reinforced nor punished."""
    for judged in groups:
        first = [float(values[0]) for values in judged.advantages if len(values)]
        if abs(sum(first)) > TOLERANCE * len(first) * max(1.0, *map(abs, first)):
            notes.fail(f"advantages of group {judged.group.id} sum to {sum(first):.3g} instead of 0")
            return


def _not_blown_up(groups: Sequence[JudgedGroup], notes: Notes) -> None:
    """Dividing by a tiny std makes an accidental difference as large as a real one."""
    spreads = {judged.group.id: stdev(rollout.reward for rollout in judged.group.valid) for judged in groups}
    limit = _most(groups)
    largest = max(abs(float(value)) for judged in groups for values in judged.advantages for value in values)
    if largest > limit * (1 + TOLERANCE):
        notes.fail(f"an advantage of {largest:.3g} is beyond what groups of this size allow ({limit:.3g})")
    usual = median(spreads.values())
    faint = [group for group, std in spreads.items() if std < FAINT_STD or std * OUTLIER < usual]
    if faint:
        std = min(spreads[group] for group in faint)
        notes.warn(
            f"{len(faint)} of {len(groups)} groups differ in their rewards by next to nothing (std {std:.2g}) and are scaled up "
            f"{1 / (std + TINY):.3g} times, to advantages as large as any",
            'set orchestrator.advantage.kind = "grpo_nostd" or "rloo", or drop the reward component that differs so little',
        )


def _most(groups: Sequence[JudgedGroup]) -> float:
    """The largest advantage that a group of n can have when divided by its unbiased std: (n - 1) / sqrt(n)."""
    return max((len(judged.group.valid) - 1) / math.sqrt(len(judged.group.valid)) for judged in groups)


def _as_in_samples(groups: Sequence[JudgedGroup], samples: Sequence[Sample], notes: Notes) -> None:
    """Samples carry these values and no others; where they stand is the mask's question."""
    expected = {key: value for judged in groups for key, value in _by_rollout(judged.group, judged.advantages).items()}
    found: dict[str, set[float]] = {}
    for sample in samples:
        found.setdefault(sample.rollout_id, set()).update(value for value in sample.advantages if value)
    for rollout_id, values in found.items():
        wanted = expected.get(rollout_id)
        if wanted is not None and values != wanted:
            told, due = (", ".join(f"{value:.4g}" for value in sorted(some)) or "none" for some in (values, wanted))
            notes.fail(f"the samples of {rollout_id} carry the advantages {told}, and its group gave it {due}")
            return


def _by_rollout(group: FinishedGroup, advantages: Sequence[FloatArray]) -> Mapping[str, set[float]]:
    """Advantages other than 0 of the turns in which something was sampled."""
    return {
        rollout.rollout_id: {float(v) for turn, v in zip(rollout.turns, values, strict=True) if turn.sampled_ids and float(v)}
        for rollout, values in zip(group.rollouts, advantages, strict=True)
        if rollout.ok
    }


ADVANTAGES = Check("advantages", "Do advantages follow the rewards, centred and of a sane size?", ("reward",), look)
