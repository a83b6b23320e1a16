"""Several runs of one configuration side by side: what each gained on held-out tasks."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from turnwise.report.changes import Change, changes
from turnwise.report.run import Run


def seeds_rows(runs: Sequence[Path]) -> dict[str, list[tuple[str, Change]]]:
    """Held-out metric -> (run name, its change), one entry for each run that evaluated it at least twice."""
    rows: dict[str, list[tuple[str, Change]]] = {}
    for root in runs:
        run = Run.load(root)
        label = f"seed {run.config['seed']}" if "seed" in run.config else run.name
        for change in changes(run):
            rows.setdefault(change.name, []).append((label, change))
    return rows


def seeds_table(runs: Sequence[Path]) -> str:
    """A Markdown table: each held-out metric, each seed, and the mean over seeds with its standard error between seeds."""
    lines = [
        "| held-out | run | before | after | difference | standard error | in SE | verdict |",
        "|---|---|" + "---:|" * 5 + "---|",
    ]
    for name, entries in seeds_rows(runs).items():
        lines += [_row(name, label, change) for label, change in entries]
        if len(entries) > 1:
            lines.append(_mean_row(name, [change for _, change in entries]))
    return "\n".join(lines)


def _mean_row(name: str, over_seeds: list[Change]) -> str:
    differences = [change.difference for change in over_seeds]
    error = stdev(differences) / math.sqrt(len(differences))
    ratio = f"{fmean(differences) / error:+.1f}" if error else "?"
    before, after = fmean(change.before for change in over_seeds), fmean(change.after for change in over_seeds)
    values = f"{before:.4g} | {after:.4g} | {fmean(differences):+.4g} | {error:.2g} | {ratio}"
    return f"| {name} | *mean of {len(over_seeds)}* | {values} | |"


def _row(name: str, label: str, change: Change) -> str:
    z = change.standard_errors
    ratio = "?" if z is None else ("±∞" if math.isinf(z) else f"{z:+.1f}")
    error = "?" if change.stderr is None else f"{change.stderr:.2g}"
    values = f"{change.before:.4g} | {change.after:.4g} | {change.difference:+.4g} | {error} | {ratio}"
    return f"| {name} | {label} | {values} | {change.verdict} |"
