"""Finished groups: their advantages, and whether they reach the trainer."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from turnwise.config import AdvantageConfig
from turnwise.orchestrator.advantage import FloatArray, group_advantages, has_signal, turn_advantages
from turnwise.orchestrator.buffer import GroupTask
from turnwise.orchestrator.types import Rollout

LISTED = 5  # distinct rewards named in an explanation


class Fate(StrEnum):
    """What became of a group."""

    SIGNAL = "signal"
    EQUAL = "equal_reward"  # all rewards equal: no gradient
    ERRORED = "errored"  # fewer than two rollouts without error
    STALE = "stale"  # sampled by a policy older than `max_staleness` allows


@dataclass(frozen=True)
class FinishedGroup:
    """All rollouts of one task, with the attempts that failed before them."""

    id: int
    task: GroupTask
    rollouts: tuple[Rollout, ...]
    failed_attempts: tuple[Rollout, ...] = ()

    @property
    def valid(self) -> list[Rollout]:
        return [rollout for rollout in self.rollouts if rollout.ok]

    @property
    def oldest_version(self) -> int | None:
        return min((r.oldest_version for r in self.valid if r.oldest_version is not None), default=None)


@dataclass(frozen=True)
class JudgedGroup:
    """A finished group, its advantages `[rollout][turn]`, and its fate."""

    group: FinishedGroup
    advantages: list[FloatArray]
    fate: Fate


class NoSignal(Exception):
    """Group after group had equal rewards; the text explains and says what to try."""


def judge(group: FinishedGroup, config: AdvantageConfig, *, oldest_allowed: int) -> JudgedGroup:
    """Compute a group's advantages and decide its fate."""
    oldest = group.oldest_version
    silent = [np.zeros(len(rollout.turns)) for rollout in group.rollouts]
    if len(group.valid) < 2:
        return JudgedGroup(group, silent, Fate.ERRORED)
    if oldest is not None and oldest < oldest_allowed:
        return JudgedGroup(group, silent, Fate.STALE)
    advantages = _advantages(group.rollouts, config)
    return JudgedGroup(group, advantages, Fate.SIGNAL if has_signal(advantages) else Fate.EQUAL)


def _advantages(rollouts: Sequence[Rollout], config: AdvantageConfig) -> list[FloatArray]:
    valid = [rollout.ok for rollout in rollouts]
    if config.per_turn:
        return turn_advantages([[turn.reward for turn in rollout.turns] for rollout in rollouts], valid=valid)
    whole = group_advantages([[rollout.reward for rollout in rollouts]], kind=config.kind, valid=[valid])[0]
    return [np.full(len(rollout.turns), value) for rollout, value in zip(rollouts, whole, strict=True)]


def explain_no_signal(judged: Sequence[JudgedGroup], *, rounds: int, needed: int, per_turn: bool) -> str:
    """Why a run cannot go on: what the equal rewards were, what they were made of, and what to try."""
    fates = [one.fate for one in judged]
    rollouts = [rollout for one in judged if one.fate is Fate.EQUAL for rollout in one.group.valid]
    counts = Counter(round(rollout.reward, 6) for rollout in rollouts).most_common()
    rewards = ", ".join(f"{value:g} ({count} rollouts)" for value, count in counts[:LISTED])
    more = f" and {len(counts) - LISTED} more" if len(counts) > LISTED else ""
    names = sorted({name for rollout in rollouts for name in rollout.components})
    means = {name: sum(r.components.get(name, 0.0) for r in rollouts) / len(rollouts) for name in names}
    components = ", ".join(f"{name} {value:.3g}" for name, value in means.items()) or "none reported"
    replies = [reply for rollout in rollouts for reply in rollout.replies()]
    hint = "" if per_turn else "; orchestrator.advantage.per_turn = true where totals tie but turns differ"
    return (
        f"{fates.count(Fate.SIGNAL)} groups of {len(fates)} carried signal and {needed} are needed: within each of the others "
        f"all rewards were equal, so there is no gradient. Rewards: {rewards}{more}. Mean components: {components}. "
        f"Distinct replies: {len(set(replies))} of {len(replies)}. What to try: more orchestrator.rollouts_per_example or a "
        f'higher orchestrator.sampling.temperature; easier or harder tasks; reward.mode = "dense" or other reward.weights{hint}; '
        f"if the run learned before, low rewards mean that it has collapsed (a lower trainer.optim.lr), and the highest "
        f"possible ones that nothing is left to learn here. "
        f"Patience: orchestrator.filters.max_rounds = {rounds}"
    )
