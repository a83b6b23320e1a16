"""`turnwise compare`: the comparison of runs as a page, as one picture, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turnwise.monitor.estimate import OverSeeds
from turnwise.report.changes import SIGNIFICANT, Change
from turnwise.report.compare import Arm, RewardRule, changes_against, differing, error_between
from turnwise.report.page import NONE, Block, Picture, Table, html_page, markdown_page
from turnwise.report.plots import Draw, grid, save
from turnwise.report.run import Metrics, Run
from turnwise.report.sweep_plots import has_metric, metric_panel
from turnwise.transport import write_atomic

CURVES = (
    *("critic/reward/mean", "actor/entropy", "response_length/mean", "num_turns/mean"),
    *("actor/grad_norm", "groups/equal_reward/share"),
)
"""Metrics of training that are drawn beside the held-out ones."""

PANEL = (5.2, 3.3)  # inches
MAX_ROWS = 24
VERDICTS = {"rose": "higher", "fell": "lower", "unchanged": "no difference beyond chance", "unknown": "no standard error"}


@dataclass(frozen=True)
class Rule:
    """The reward of one arm, by which the rollouts of all are paid."""

    name: str
    rule: RewardRule

    @property
    def metric(self) -> str:
        return f"val-reward as {self.name}/mean"


def write_compared(arms: Sequence[Arm], folder: Path) -> Path:
    """Write `comparison.md`, `comparison.html`, `comparison.png` and `comparison.json`; returns the first.

    Raises:
        ValueError: an environment of the runs cannot be made here.
        OSError: the file system refused.
    """
    rules = _rules(arms)
    names = _held_out(arms)
    picture = Picture("Held-out and training curves", _draw(arms, rules, folder / "comparison.png"))
    blocks = [*comparison_blocks(arms, rules, names), "## Curves", picture]
    write_atomic(folder / "comparison.json", (json.dumps(_as_json(arms, rules, names), indent=2) + "\n").encode())
    write_atomic(folder / "comparison.html", html_page("Comparison", blocks).encode())
    write_atomic(folder / "comparison.md", markdown_page(folder, blocks).encode())
    return folder / "comparison.md"


def comparison_blocks(arms: Sequence[Arm], rules: Sequence[Rule], names: Sequence[str]) -> list[Block]:
    """The page but for its picture."""
    blocks: list[Block] = ["# Comparison", runs_table(arms)]
    keys = differing(arms)
    if len(arms) > 1:
        blocks += ["## What differs", _differences_table(arms, keys) if keys else "The configurations are the same."]
    blocks += ["## Held-out reward", f"{_reward_words(rules)} {_caution(arms)}", rewards_table(arms, rules)]
    blocks += ["## Held-out metrics", "At the last evaluations.", metrics_table(arms, names)]
    return blocks


def runs_table(arms: Sequence[Arm]) -> Table:
    """Which runs make up each arm, and how far they went."""
    rows = [
        (
            arm.name,
            str(len(arm.runs)),
            ", ".join(str(run.config.get("seed", "?")) for run in arm.runs),
            ", ".join(_steps(run) for run in arm.runs),
            ", ".join(str(run.root) for run in arm.runs),
        )
        for arm in arms
    ]
    return Table(("arm", "runs", "seeds", "steps", "folders"), tuple(rows), frozenset({1}))


def rewards_table(arms: Sequence[Arm], rules: Sequence[Rule]) -> Table:
    """What the evaluated rollouts of each arm earn under each reward: before, after, and the difference to the first arm."""
    rows: list[tuple[str, ...]] = []
    for rule in rules:
        first = arms[0].earned(rule.rule)
        for arm in arms:
            before, after = arm.earned(rule.rule, first=True), arm.earned(rule.rule)
            change = _against(first, after) if arm is not arms[0] else None
            rows.append((rule.name, arm.name, _told(before), _told(after), *_verdict(change)))
    heads = ("paid as", "arm", "first evaluation", "last evaluation", "to the first arm", "in standard errors", "verdict")
    return Table(heads, tuple(rows), frozenset({2, 3, 4, 5})).without_empty_columns()


def metrics_table(arms: Sequence[Arm], names: Sequence[str]) -> Table:
    """Held-out metrics at the last evaluation: scores, what the tasks were about, and whatever differs beyond chance."""
    changes = [{change.name: change for change in changes_against(arms[0], arm, names)} for arm in arms[1:]]

    def differs(name: str) -> bool:
        return any((c := found.get(name.rsplit("/", 1)[0])) is not None and c.verdict != "unchanged" for found in changes)

    outcomes = _outcomes(arms)
    shown = [name for name in names if name.startswith("val-core/") or name in outcomes or differs(name)][:MAX_ROWS]
    rows: list[tuple[str, ...]] = []
    for name in shown:
        short = name.rsplit("/", 1)[0]
        verdicts = [_verdict(found.get(short))[-1] for found in changes]
        rows.append((short, *(_told(arm.estimate(name)) for arm in arms), *verdicts))
    against = [f"{arm.name} to {arms[0].name}" if len(arms) > 2 else "verdict" for arm in arms[1:]]
    return Table(("metric", *(arm.name for arm in arms), *against), tuple(rows), frozenset(range(1, len(arms) + 1)))


def _rules(arms: Sequence[Arm]) -> list[Rule]:
    """The rewards of the arms, each once, under the name of the first arm that has it."""
    rules: list[Rule] = []
    for arm in arms:
        if all(arm.reward != known.rule for known in rules):
            rules.append(Rule(arm.name, arm.reward))
    return rules


def _held_out(arms: Sequence[Arm]) -> list[str]:
    """Names of held-out means that every arm reports; the reward, which each arm counts in its own way, is not among them."""
    names = [{name for run in arm.runs for name in run.names("val-", "/mean")} for arm in arms]
    every = set.intersection(*names)
    return sorted(name for name in every if not (name.startswith("val-core/") and name.endswith("/reward/mean")))


def _outcomes(arms: Sequence[Arm]) -> set[str]:
    """Names of the held-out components that say what the tasks were about."""
    return {f"val-aux/{env}/{name}/mean" for arm in arms for env, own in arm.reward.outcome.items() for name in own}


def _draw(arms: Sequence[Arm], rules: Sequence[Rule], path: Path) -> Path:
    runs = {arm.name: [_with_rules(run, rules) for run in arm.runs] for arm in arms}
    outcomes = _outcomes(arms)
    scores = [name for name in _held_out(arms) if name.startswith("val-core/") or name in outcomes]
    wanted = [(rule.metric, _title(rule, rules)) for rule in rules] + [(name, name) for name in (*scores, *CURVES)]
    panels: list[Draw] = []
    for name, title in wanted:
        known = {arm: [metrics for metrics in own if has_metric(metrics, name)] for arm, own in runs.items()}
        if any(known.values()):
            panels.append(metric_panel(known, name, title=title, legend="none" if panels else "inside"))
    most = max(len(arm.runs) for arm in arms)
    spread = "mean over seeds, band of one standard deviation" if most > 1 else "one run each"
    return save(grid(panels, title=f"{' against '.join(arm.name for arm in arms)}: {spread}", panel=PANEL), path)


def _title(rule: Rule, rules: Sequence[Rule]) -> str:
    return f"held-out reward, paid as {rule.name}" if len(rules) > 1 else "held-out reward"


def _with_rules(run: Run, rules: Sequence[Rule]) -> Metrics:
    """The metrics of a run with what its evaluations earn under each rule."""
    metrics = {step: dict(values) for step, values in run.metrics.items()}
    for step in run.evals:
        for rule in rules:
            earned = rule.rule.of_evaluation(run, step)
            if earned is not None:
                mean, error = earned
                values = metrics.setdefault(step, {})
                values[rule.metric] = mean
                if error is not None:
                    values[rule.metric.removesuffix("mean") + "stderr"] = error
    return dict(sorted(metrics.items()))


def _differences_table(arms: Sequence[Arm], keys: Sequence[tuple[str, Sequence[str]]]) -> Table:
    return Table(("key", *(arm.name for arm in arms)), tuple((key, *values) for key, values in keys))


def _reward_words(rules: Sequence[Rule]) -> str:
    if len(rules) == 1:
        return "All runs are paid by the same rule. Means over seeds with standard errors."
    return (
        "The rollouts of the evaluations, paid by the reward of each arm from their recorded components: a run's own reward "
        "says nothing about a run that is paid otherwise. Means over seeds with standard errors."
    )


def _caution(arms: Sequence[Arm]) -> str:
    fewest = min(len(arm.runs) for arm in arms)
    text = f"A verdict needs a difference of at least {SIGNIFICANT:.0f} standard errors."
    if fewest < 2:
        text += " With one seed nothing here measures the spread between seeds: run more before believing a difference."
    last = {run.eval_steps[-1] for arm in arms for run in arm.runs if run.eval_steps}
    unlike = f" **The last evaluations are of different steps: {', '.join(map(str, sorted(last)))}.**" if len(last) > 1 else ""
    return text + unlike


def _against(first: OverSeeds, other: OverSeeds) -> Change | None:
    if first.mean is None or other.mean is None:
        return None
    return Change("", "reward", first.mean, other.mean, error_between(first, other))


def _verdict(change: Change | None) -> tuple[str, str, str]:
    if change is None:
        return NONE, NONE, NONE
    z = change.standard_errors
    return f"{change.difference:+.3g}", NONE if z is None else f"{z:+.1f}", VERDICTS[change.verdict]


def _told(value: OverSeeds) -> str:
    if value.mean is None:
        return NONE
    return f"{value.mean:.3g}" + ("" if value.stderr is None else f" ± {value.stderr:.2g}")


def _steps(run: Run) -> str:
    last, planned = max(run.train_steps, default=0), run.config.get("max_steps")
    return str(last) if planned in (None, last) else f"{last} of {planned}"


def _as_json(arms: Sequence[Arm], rules: Sequence[Rule], names: Sequence[str]) -> dict[str, Any]:
    def numbers(value: OverSeeds) -> dict[str, Any]:
        return {**asdict(value), "mean": value.mean, "stderr": value.stderr}

    return {
        "arms": [{"name": arm.name, "runs": [str(run.root) for run in arm.runs]} for arm in arms],
        "differences": [{"key": key, "values": values} for key, values in differing(arms)],
        "rewards": [
            {
                "paid_as": rule.name,
                "arm": arm.name,
                "first": numbers(arm.earned(rule.rule, first=True)),
                "last": numbers(arm.earned(rule.rule)),
            }
            for rule in rules
            for arm in arms
        ],
        "metrics": [{"name": name, "arm": arm.name, **numbers(arm.estimate(name))} for name in names for arm in arms],
    }
