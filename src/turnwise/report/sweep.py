"""A sweep in numbers: the state and the score of each run, experiments compared over their seeds, and questions answered."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import fmean

from turnwise.config.sweep import SweepConfig
from turnwise.monitor.estimate import OverSeeds
from turnwise.report.changes import Change


class RunState(StrEnum):
    """Where a run stands."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETE = "complete"  # all steps and the final evaluation
    ENDED_EARLY = "ended early"
    FAILED = "failed"  # and not tried again


@dataclass(frozen=True)
class Score:
    """The metric of a sweep at one evaluation."""

    value: float
    step: int
    stderr: float | None = None  # over the evaluated tasks


@dataclass(frozen=True)
class SweepRow:
    """One run: an experiment with one seed."""

    label: str
    experiment: str
    title: str
    seed: int
    folder: Path
    state: RunState = RunState.PENDING
    reason: str = ""  # why it ended early or failed
    step: int = 0
    max_steps: int | None = None  # None: not begun
    scores: tuple[Score, ...] = ()  # of all evaluations, ascending
    started: float | None = None  # unix time
    ended: float | None = None
    attempts: int = 0
    gpus: tuple[int, ...] = ()
    verdict: str = ""  # whether it learns, in a word

    @property
    def result(self) -> Score | None:
        """The last evaluation."""
        return self.scores[-1] if self.scores else None

    @property
    def best(self) -> Score | None:
        return max(self.scores, key=lambda score: score.value, default=None)


@dataclass(frozen=True)
class Comparison(OverSeeds):
    """An experiment over the seeds whose runs are complete: final scores."""

    experiment: str
    title: str
    unfinished: int  # runs that do not count
    best: float | None  # mean over seeds of each run's best evaluation
    reference: float | None = None
    note: str = ""


def scores_of(metrics: Mapping[int, Mapping[str, float]], name: str) -> tuple[Score, ...]:
    """The evaluations in a run's metrics that report `name`."""
    error = name.removesuffix("mean") + "stderr"
    return tuple(Score(values[name], step, values.get(error)) for step, values in sorted(metrics.items()) if name in values)


def compare(sweep: SweepConfig, rows: Sequence[SweepRow]) -> list[Comparison]:
    """One entry for each experiment that has a row, in the order of the sweep. Runs that are not complete enter no mean."""
    found: list[Comparison] = []
    for run in sweep.run:
        own = [row for row in rows if row.experiment == run.id]
        if not own:
            continue
        complete = [row for row in own if row.state is RunState.COMPLETE and row.result]
        finals = [row.result for row in complete if row.result]
        over_seeds = OverSeeds.of([score.value for score in finals], [score.stderr for score in finals])
        found.append(
            Comparison(
                values=over_seeds.values,
                seed_stderr=over_seeds.seed_stderr,
                task_stderr=over_seeds.task_stderr,
                experiment=run.id,
                title=run.title,
                unfinished=len(own) - len(complete),
                best=fmean(row.best.value for row in complete if row.best) if complete else None,
                reference=run.reference,
                note=run.note,
            )
        )
    return found


def answers(sweep: SweepConfig, compared: Sequence[Comparison]) -> list[Change]:
    """The pairs of `compare` whose experiments both have a mean: `before` is what the other is held against.

    The two means are taken as independent. With one seed their standard errors are those of the tasks alone, and the true ones
    are larger: another seed also trains differently.
    """
    by_id = {one.experiment: one for one in compared if one.values}
    found: list[Change] = []
    for name, against in sweep.compare:
        one, other = by_id.get(name), by_id.get(against)
        if one is None or other is None or one.mean is None or other.mean is None:
            continue
        stderr = None if one.stderr is None or other.stderr is None else math.hypot(one.stderr, other.stderr)
        found.append(Change(f"{name} against {against}", "metric", other.mean, one.mean, stderr))
    return found


def caution(sweep: SweepConfig, compared: Sequence[Comparison]) -> str:
    """What the scores can and cannot show, in a sentence with this sweep's numbers."""
    errors = [one.task_stderr for one in compared if one.task_stderr is not None]
    if not any(errors):
        why = "Every evaluated task got the same score" if errors else "No evaluation came with a standard error"
        return f"{why}: nothing says which differences are more than chance."
    unit, factor = ("points", 100) if sweep.percent else ("", 1)
    error = fmean(errors) * factor
    text = (
        f"One run's score has a standard error of about {error:.2g} {unit}".rstrip()
        + f" from the evaluated tasks alone, so two single runs that differ by less than {2 * error:.2g} {unit}".rstrip()
        + " do not differ beyond chance; seeds add their own spread."
    )
    fewest = min((len(one.values) for one in compared if one.values), default=0)
    if fewest < 2:
        return f"{text} With one seed nothing here measures that spread: run more (`--seeds 3`) before believing a difference."
    return (
        f"{text} Standard errors here are between seeds ({fewest} runs and more of each), but no less than the tasks alone give."
    )
