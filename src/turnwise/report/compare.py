"""Runs side by side: which are seeds of one configuration, what differs, and what each would have earned by another's reward."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from turnwise.config import EnvConfig
from turnwise.config.differences import Difference, differences, leaves, shown
from turnwise.envs import make
from turnwise.envs.rewards import compose
from turnwise.monitor.estimate import OverSeeds, over_tasks
from turnwise.orchestrator.environments import env_names
from turnwise.report.changes import Change
from turnwise.report.run import Run, rollouts_of

SAME = ("seed", "output_dir", "run_name", "trajectories_dir", "inference.port", "model.quantized", "wandb.", "mlflow.")
"""Keys in which seeds of one configuration may differ, or that say where a run lies and not what it is."""

CLIPPED = 48  # characters of a label made from keys
OVERLONG = "overlong"  # the component that a run's own penalty adds, whatever its reward mode


@dataclass(frozen=True)
class Arm:
    """Runs that differ by their seed alone."""

    name: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> Mapping[str, Any]:
        return self.runs[0].config

    @cached_property
    def reward(self) -> "RewardRule":
        return RewardRule.of(self.config)

    def estimate(self, name: str, *, first: bool = False) -> OverSeeds:
        """A held-out metric at the last evaluation of each run, or at the first."""
        found = [value for run in self.runs if (value := _evaluated(run, name, first=first)) is not None]
        return OverSeeds.of([value for value, _ in found], [error for _, error in found])

    def earned(self, rule: "RewardRule", *, first: bool = False) -> OverSeeds:
        """The held-out reward that the evaluated rollouts would have had under a rule."""
        found = [earned for run in self.runs if run.evals and (earned := rule.of_evaluation(run, _at(run.evals, first=first)))]
        return OverSeeds.of([value for value, _ in found], [error for _, error in found])


@dataclass(frozen=True)
class RewardRule:
    """How a configuration makes one number of recorded components."""

    envs: Mapping[str, EnvConfig]  # by the name that rollouts carry
    outcome: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "RewardRule":
        """The rule of a run's config.toml, for its evaluation.

        Raises:
            ValueError: an environment cannot be made here, so that its outcome components are not known.
        """
        orchestrator = config.get("orchestrator", {})
        tables = [EnvConfig.model_validate(table) for table in orchestrator.get("eval_env") or orchestrator.get("env", [])]
        envs = dict(zip(env_names(tables), tables, strict=True))
        return cls(envs, {name: frozenset(make(table.id, table.args).outcome_components) for name, table in envs.items()})

    def of_rollout(self, rollout: Mapping[str, Any]) -> float | None:
        """None for a rollout that errored or of an environment that this rule does not know."""
        env = self.envs.get(str(rollout.get("env")))
        if env is None or rollout.get("error"):
            return None
        components = {str(name): float(value) for name, value in (rollout.get("components") or {}).items()}
        overlong = components.pop(OVERLONG, 0.0)
        return compose(components, env.reward, outcome_components=self.outcome[str(rollout["env"])]) + overlong

    def of_evaluation(self, run: Run, step: int) -> tuple[float, float | None] | None:
        """Mean over the evaluated rollouts with its standard error over tasks; None where nothing can be told."""
        rollouts = rollouts_of(run.evals[step])
        paid = [(str(r.get("task_id")), value) for r in rollouts if (value := self.of_rollout(r)) is not None]
        return over_tasks(paid) if paid else None


def arms_of(runs: Sequence[tuple[str | None, Path]]) -> list[Arm]:
    """Group run folders into arms.

    Args:
        runs: (name, folder); runs given one name are one arm, others are grouped by their configuration.

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: a folder holds no run, or one is named twice.
    """
    groups: dict[object, list[Run]] = {}
    for name, folder in runs:
        run = Run.load(folder)
        if not run.metrics:
            raise ValueError(f"{folder} holds no run: it has no metrics.jsonl with a line, and no evaluation")
        if any(run.root.resolve() == other.root.resolve() for group in groups.values() for other in group):
            raise ValueError(f"{folder} is given twice")
        groups.setdefault(name or _what(run), []).append(run)
    firsts = [group[0] for group in groups.values()]
    names = [key if isinstance(key, str) else "" for key in groups]
    labels = [name or label for name, label in zip(names, _labels(firsts), strict=True)]
    return [Arm(label, tuple(group)) for label, group in zip(_unlike(labels), groups.values(), strict=True)]


def differing(arms: Sequence[Arm]) -> list[tuple[str, list[str]]]:
    """(key, its value in each arm) wherever the arms' configurations differ."""
    first = arms[0].config
    changed = [{d.key: d for d in _differences(first, arm.config)} for arm in arms]
    keys = dict.fromkeys(key for found in changed for key in found)
    return [(key, [_value(key, found, changed) for found in changed]) for key in keys]


def changes_against(first: Arm, arm: Arm, names: Sequence[str]) -> list[Change]:
    """Held-out metrics of an arm against the first one's, at their last evaluations; those that both report."""
    found: list[Change] = []
    for name in names:
        one, other = first.estimate(name), arm.estimate(name)
        if one.mean is not None and other.mean is not None:
            found.append(Change(name.rsplit("/", 1)[0], "metric", one.mean, other.mean, error_between(one, other)))
    return found


def error_between(one: OverSeeds, other: OverSeeds) -> float | None:
    """Standard error of a difference of two means, taken as independent; None where either is not known."""
    return None if one.stderr is None or other.stderr is None else math.hypot(one.stderr, other.stderr)


def _evaluated(run: Run, name: str, *, first: bool) -> tuple[float, float | None] | None:
    steps = [step for step in run.eval_steps if name in run.metrics[step]]
    if not steps:
        return None
    values = run.metrics[_at(steps, first=first)]
    return values[name], values.get(f"{name.rsplit('/', 1)[0]}/stderr")


def _at(steps: "Sequence[int] | Mapping[int, object]", *, first: bool) -> int:
    return min(steps) if first else max(steps)


def _what(run: Run) -> tuple[tuple[str, str], ...]:
    """What a configuration says, but for the keys in which seeds differ."""
    return tuple((key, shown(value)) for key, value in sorted(leaves(run.config).items()) if not _ignored(key))


def _ignored(key: str) -> bool:
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in SAME)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[Difference]:
    return [difference for difference in differences(one, other) if not _ignored(difference.key)]


def _value(key: str, own: Mapping[str, Difference], every: Sequence[Mapping[str, Difference]]) -> str:
    """The value in one arm; that of the first where the arm does not differ from it."""
    return own[key].after if key in own else next(found[key].before for found in every if key in found)


def _labels(runs: Sequence[Run]) -> list[str]:
    """What sets each configuration apart from the others, short; the run's name where that would be long."""
    if len(runs) == 1:
        return [runs[0].name]
    keys = differing([Arm("", (run,)) for run in runs])
    labels: list[str] = []
    for at, run in enumerate(runs):
        told = ", ".join(f"{key.rpartition('.')[2]} = {values[at]}" for key, values in keys)
        labels.append(told if 0 < len(told) <= CLIPPED else run.name)
    return labels


def _unlike(labels: Sequence[str]) -> list[str]:
    """Labels that occur twice get a number."""
    numbered = [f"{label} ({labels[: at + 1].count(label)})" for at, label in enumerate(labels)]
    return [one if labels.count(label) > 1 else label for label, one in zip(labels, numbered, strict=True)]
