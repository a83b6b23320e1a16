"""Pictures of a sweep: one for each metric, a line for each experiment, bands over its seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal

from turnwise.report.plots import COLOURS, SMOOTH_SHARE, Draw, grid, save, smoothed
from turnwise.report.run import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINES = (*COLOURS, "#333333")
STYLES = ("-", "--", ":")  # beyond the colours, lines differ by their dashes
PANEL = (9.6, 4.6)  # inches
FEW_POINTS = 15  # are marked one by one
BESIDE = 0.012  # of the steps, between the error bars of two experiments at the end
Legend = Literal["beside", "inside", "none"]
Runs = Mapping[str, Sequence[Metrics]]  # what an experiment is called -> metrics of its runs, by step


def draw_sweep(runs: Runs, names: Sequence[str], folder: Path, *, title: str) -> list[tuple[str, Path]]:
    """Draw each metric that a run reports into `folder` as PNG. Returns (metric, file) in the order of `names`."""
    drawn: list[tuple[str, Path]] = []
    for name in dict.fromkeys(names):
        known = {experiment: [metrics for metrics in own if has_metric(metrics, name)] for experiment, own in runs.items()}
        if any(known.values()):
            figure = grid([metric_panel(known, name)], title=title, panel=PANEL)
            drawn.append((name, save(figure, folder / f"{name.replace('/', '_')}.png")))
    return drawn


def band(runs: Sequence[tuple[Sequence[int], Sequence[float]]]) -> tuple[list[int], list[float], list[float]]:
    """Steps, mean and standard deviation over runs, at the steps that all of them reached; the deviation of one run is 0."""
    shared = sorted(set.intersection(*(set(steps) for steps, _ in runs)))
    by_run = [dict(zip(steps, values, strict=True)) for steps, values in runs]
    columns = [[values[step] for values in by_run] for step in shared]
    return shared, [fmean(column) for column in columns], [stdev(column) if len(column) > 1 else 0.0 for column in columns]


def metric_panel(runs: Runs, name: str, *, title: str | None = None, legend: Legend = "beside") -> Draw:
    """A metric of each experiment, as mean and band over the runs that report it."""
    held_out = name.startswith("val-")

    def draw(axes: "Axes") -> None:
        for index, (experiment, own) in enumerate(runs.items()):
            if own:
                colour, style = LINES[index % len(LINES)], STYLES[index // len(LINES) % len(STYLES)]
                _curve(axes, own, name, colour=colour, style=style, label=_label(experiment, own))
                if held_out and len(own) == 1:
                    _error_bar(axes, own[0], name, colour=colour, place=index + 1)
        most = max(len(own) for own in runs.values())
        told = ": mean over seeds, band of one standard deviation" if most > 1 else ""
        axes.set_title(title or f"{name}{told or (': one seed, standard error over tasks at its end' if held_out else '')}")
        if legend == "beside":
            axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        elif legend == "inside":
            axes.legend(fontsize=8, frameon=False)

    return draw


def _curve(axes: "Axes", own: Sequence[Metrics], name: str, *, colour: str, style: str, label: str) -> None:
    steps, means, spread = band([_series(metrics, name) for metrics in own])
    marker = "o" if len(steps) < FEW_POINTS else None
    axes.plot(steps, means, color=colour, linestyle=style, linewidth=1.8, marker=marker, markersize=4, label=label)
    if len(own) > 1:
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _error_bar(axes: "Axes", metrics: Metrics, name: str, *, colour: str, place: int) -> None:
    """The last value with its standard error, right of the curves, where no other experiment's covers it."""
    steps, values = _series(metrics, name)
    error = metrics[steps[-1]].get(name.removesuffix("mean") + "stderr")
    x = steps[-1] + place * BESIDE * max(steps[-1], 1)
    axes.errorbar([x], values[-1:], yerr=error, color=colour, fmt="o", markersize=3, capsize=2, linewidth=1.2)


def _series(metrics: Metrics, name: str) -> tuple[list[int], list[float]]:
    """A run's values, those of training smoothed over a twentieth of the run."""
    held_out = name.startswith("val-")
    steps = [step for step, values in sorted(metrics.items()) if name in values]
    values = [metrics[step][name] for step in steps]
    return steps, values if held_out else smoothed(values, max(1, len(values) // SMOOTH_SHARE))


def has_metric(metrics: Metrics, name: str) -> bool:
    """Whether a run reports a metric at any step."""
    return any(name in values for values in metrics.values())


def _label(experiment: str, own: Sequence[Metrics]) -> str:
    return experiment if len(own) == 1 else f"{experiment} ({len(own)} seeds)"
