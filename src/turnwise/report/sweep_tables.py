"""The tables of a sweep, as rows of text: for terminals, Markdown and HTML alike."""

import time
from collections.abc import Sequence

from turnwise.config.sweep import SweepConfig
from turnwise.report.changes import Change
from turnwise.report.page import NONE, Table
from turnwise.report.sweep import Comparison, RunState, Score, SweepRow

VERDICTS = {"rose": "better", "fell": "worse", "unchanged": "no difference beyond chance", "unknown": "no standard error"}


def status_table(sweep: SweepConfig, rows: Sequence[SweepRow]) -> Table:
    """Each run: its state, how far it is, its score so far and at its best, when it ran."""
    references = {run.id: run.reference for run in sweep.run}
    heads = ("run", "what", "state", "step", "verdict", "result", "best (step)", _reference_head(sweep), "start", "end", "remark")
    cells = [
        (
            row.label,
            row.title,
            str(row.state),
            _steps(row),
            row.verdict,
            _result(row, sweep),
            _score(row.best, sweep) + (f" ({row.best.step})" if row.best else ""),
            _reference(references[row.experiment]),
            clock(row.started),
            clock(row.ended),
            remark(row),
        )
        for row in rows
    ]
    return Table(heads, tuple(cells), frozenset({3, 5, 6, 7})).without_empty_columns()


def comparison_table(sweep: SweepConfig, compared: Sequence[Comparison]) -> Table:
    """Each experiment: mean over seeds with its standard error, and what it is held against."""
    heads = ("experiment", "what", "seeds", "mean", "standard error", "between seeds", "over tasks", "single runs")
    heads = (*heads, "mean of the best", _reference_head(sweep), "remark")
    cells: list[tuple[str, ...]] = []
    for one in compared:
        remarks = [one.note] if one.note else []
        remarks += [f"{one.unfinished} of {one.unfinished + len(one.values)} runs not complete"] if one.unfinished else []
        cells.append(
            (
                one.experiment,
                one.title,
                str(len(one.values)),
                number(one.mean, sweep),
                number(one.stderr, sweep),
                number(one.seed_stderr, sweep),
                number(one.task_stderr, sweep),
                ", ".join(number(value, sweep) for value in one.values) or NONE,
                number(one.best, sweep),
                _reference(one.reference),
                "; ".join(remarks),
            )
        )
    return Table(heads, tuple(cells), frozenset({2, 3, 4, 5, 6, 8, 9})).without_empty_columns()


def answers_table(sweep: SweepConfig, found: Sequence[Change]) -> Table:
    """Each question of `compare`: the difference, and whether it is more than chance."""
    heads = ("question", "difference", "standard error", "in standard errors", "verdict")
    cells = [
        (
            change.name,
            f"{change.difference * (100 if sweep.percent else 1):+.2f}",
            number(change.stderr, sweep),
            NONE if change.standard_errors is None else f"{change.standard_errors:+.1f}",
            VERDICTS[change.verdict],
        )
        for change in found
    ]
    return Table(heads, tuple(cells), frozenset({1, 2, 3}))


def remark(row: SweepRow) -> str:
    """Why a run is not complete, and how often it was started if that was not once."""
    return " ".join(filter(None, [row.reason, f"({row.attempts} starts)" if row.attempts > 1 else ""]))


def number(value: float | None, sweep: SweepConfig) -> str:
    """A value of the sweep's metric: `73.24` for 0.7324 with `percent`."""
    if value is None:
        return NONE
    return f"{100 * value:.2f}" if sweep.percent else f"{value:.4g}"


def clock(when: float | None) -> str:
    """Unix time as local date and time."""
    return NONE if when is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


def _steps(row: SweepRow) -> str:
    return NONE if row.max_steps is None else f"{row.step}/{row.max_steps}"


def _result(row: SweepRow, sweep: SweepConfig) -> str:
    """The last score; of a run that is not complete with its step, since it is no result yet."""
    at = f" @{row.result.step}" if row.result and row.state is not RunState.COMPLETE else ""
    return _score(row.result, sweep) + at


def _score(score: Score | None, sweep: SweepConfig) -> str:
    if score is None:
        return NONE
    return number(score.value, sweep) + ("" if score.stderr is None else f" ± {number(score.stderr, sweep)}")


def _reference_head(sweep: SweepConfig) -> str:
    """Scores from elsewhere are those of full experiments: beside shortened ones they say so."""
    return "reference, full" if sweep.overlays else "reference"


def _reference(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"
