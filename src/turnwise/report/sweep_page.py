"""The pages of a sweep: its state at every moment, and one page that compares its experiments, as Markdown and as HTML."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from turnwise.config.sweep import SweepConfig
from turnwise.report.page import Block, Picture, html_page, markdown_page
from turnwise.report.run import Metrics
from turnwise.report.sweep import RunState, SweepRow, answers, caution, compare
from turnwise.report.sweep_plots import draw_sweep
from turnwise.report.sweep_tables import answers_table, comparison_table, status_table
from turnwise.transport import write_atomic

Shortened = Sequence[str]  # "key: before -> after", what overlays and flags change


def write_status(root: Path, sweep: SweepConfig, rows: Sequence[SweepRow]) -> None:
    """Write `status.md` and `status.json`. Raises OSError when the file system refuses."""
    counts = ", ".join(f"{sum(row.state is state for row in rows)} {state}" for state in RunState)
    told = f"# {sweep.name}\n\n{counts}; {time.strftime('%Y-%m-%d %H:%M:%S')}. Result: `{sweep.metric}`.\n\n"
    write_atomic(root / "status.md", (told + status_table(sweep, rows).markdown() + "\n").encode())
    write_atomic(root / "status.json", (json.dumps(status_json(sweep, rows), indent=2) + "\n").encode())


def status_json(sweep: SweepConfig, rows: Sequence[SweepRow]) -> dict[str, Any]:
    """The state as plain values; scores are not multiplied."""
    listed = [
        {
            **asdict(row),
            "folder": str(row.folder),
            "result": row.result and asdict(row.result),
            "best": row.best and asdict(row.best),
        }
        for row in rows
    ]
    return {"name": sweep.name, "metric": sweep.metric, "updated": time.time(), "runs": listed}


def write_comparison(
    root: Path, sweep: SweepConfig, rows: Sequence[SweepRow], metrics: Mapping[str, Metrics], shortened: Shortened = ()
) -> Path:
    """Write `comparison.md`, `comparison.html` (pictures inside), `comparison.json` and the pictures; returns the first.

    Args:
        metrics: of each run, by its label.
        shortened: what overlays and flags change.

    Raises:
        OSError: the file system refused.
    """
    pictures = draw_sweep(_curves(sweep, rows, metrics), [sweep.metric, *sweep.plots], root / "pictures", title=sweep.name)
    blocks = _blocks(sweep, rows, [Picture(name, path) for name, path in pictures], shortened)
    compared = compare(sweep, rows)
    numbers = {
        "metric": sweep.metric,
        "experiments": [{**asdict(one), "mean": one.mean, "stderr": one.stderr} for one in compared],
        "answers": [change.as_dict() for change in answers(sweep, compared)],
        "caution": caution(sweep, compared),
    }
    write_atomic(root / "comparison.json", (json.dumps(numbers, indent=2) + "\n").encode())
    write_atomic(root / "comparison.html", html_page(sweep.name, blocks).encode())
    write_atomic(root / "comparison.md", markdown_page(root, blocks).encode())
    return root / "comparison.md"


def _curves(sweep: SweepConfig, rows: Sequence[SweepRow], metrics: Mapping[str, Metrics]) -> dict[str, list[Metrics]]:
    """The runs whose curves stand for each experiment: those that are complete, or all while none is.

    A mean over seeds reaches as far as the shortest of them: one that ended early would cut the others short.
    """
    curves: dict[str, list[Metrics]] = {}
    for run in sweep.run:
        own = [row for row in rows if row.experiment == run.id and row.label in metrics]
        complete = [row for row in own if row.state is RunState.COMPLETE]
        curves[f"{run.id}  {run.title}".strip()] = [metrics[row.label] for row in complete or own]
    return curves


def _blocks(sweep: SweepConfig, rows: Sequence[SweepRow], pictures: Sequence[Picture], shortened: Shortened) -> list[Block]:
    compared = compare(sweep, rows)
    answered = answers(sweep, compared)
    missing = sum(row.state is not RunState.COMPLETE for row in rows)
    blocks: list[Block] = [f"# {sweep.name}"]
    if missing:
        blocks.append(f"{missing} of {len(rows)} runs are not complete; they enter no mean.")
    if shortened:
        blocks += ["These are not the full experiments. Overlays or flags changed:", list(shortened)]
    blocks += ["## Comparison", f"`{sweep.metric}` at the final evaluation. {caution(sweep, compared)}"]
    blocks.append(comparison_table(sweep, compared))
    if answered:
        blocks += ["## Questions", answers_table(sweep, answered)]
        blocks.append("A verdict other than *no difference beyond chance* means a difference of at least three standard errors.")
    blocks += ["## Runs", status_table(sweep, rows)]
    if pictures:
        blocks += ["## Curves", "Training metrics are running means over a twentieth of the run.", *pictures]
    return blocks
