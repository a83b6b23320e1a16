"""Pictures of one run, and of several seeds of one configuration. Drawn off screen; no state is shared with pyplot."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from turnwise.report.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
PANEL = (4.6, 3.1)  # inches of one panel
DPI = 110
SMOOTH_SHARE = 20  # the bold line is a mean over one twentieth of the run, at least 3 steps
MAX_PANELS = 12

Draw = Callable[["Axes"], None]
Series = tuple[list[int], list[float]]  # steps and values


def draw_run(run: Run, folder: Path) -> list[tuple[str, Path]]:
    """Draw what the run has measured into `folder` as PNG. Returns (caption, file), in the order of the report."""
    pictures = [
        ("Reward: training rollouts, and held-out tasks with their standard errors", "reward", _reward_panels(run)),
        ("Reward components: training, and held-out tasks with standard errors", "components", _component_panels(run)),
        ("Environment metrics", "env", [_line_panel(run, name) for name in run.names("env/", "/mean")]),
        ("Optimisation", "training", _named_panels(run, _TRAINING)),
        ("Length, turns and variety", "length", _named_panels(run, _LENGTH, from_zero=True) + _variety_panels(run)),
        ("Time", "timing", _timing_panels(run)),
    ]
    drawn = [(caption, folder / f"{name}.png", panels) for caption, name, panels in pictures if panels]
    for caption, path, panels in drawn:
        left_out = f" ({MAX_PANELS} of {len(panels)})" if len(panels) > MAX_PANELS else ""
        save(grid(panels[:MAX_PANELS], title=f"{run.name}: {caption.split(':')[0].lower()}{left_out}"), path)
    return [(caption, path) for caption, path, _ in drawn]


def plot_seeds(runs: Sequence[Path], names: Sequence[str], out: Path, *, window: int = 1) -> Path:
    """Draw metrics of several runs of one configuration: mean over seeds, a band of one standard deviation, thin lines per seed.

    Args:
        runs: run folders, one a seed.
        names: full metric names; those that no run reports are left out.
        out: PNG file to write.
        window: steps of the running mean that smooths each seed first; 1 for none.

    Raises:
        ValueError: none of the runs reports any of the names.
    """
    loaded = [Run.load(root) for root in runs]
    known = [name for name in names if any(run.series(name)[0] for run in loaded)]
    if not known:
        raise ValueError(f"none of {', '.join(map(str, runs))} reports {', '.join(names)}")
    panels = [_seeds_panel(loaded, name, 1 if name.startswith("val-") else window) for name in known]
    return save(grid(panels, title=f"{len(loaded)} seeds: mean and standard deviation"), out)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over about `window` values around each; over those that there are at the ends. Centred: a curve is not shifted."""
    before, after = (window - 1) // 2, window // 2
    return [fmean(values[max(0, at - before) : at + after + 1]) for at in range(len(values))]


def _seeds_panel(runs: Sequence[Run], name: str, window: int) -> Draw:
    def draw(axes: "Axes") -> None:
        by_step: dict[int, list[float]] = {}
        for run in runs:
            steps, values = run.series(name)
            values = smoothed(values, window)
            axes.plot(steps, values, color=SKY, linewidth=0.8, alpha=0.7)
            for step, value in zip(steps, values, strict=True):
                by_step.setdefault(step, []).append(value)
        steps = sorted(step for step, values in by_step.items() if len(values) == max(map(len, by_step.values())))
        means = [fmean(by_step[step]) for step in steps]
        spread = [stdev(by_step[step]) if len(by_step[step]) > 1 else 0.0 for step in steps]
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.2, linewidth=0)
        axes.plot(steps, means, color=BLUE, linewidth=2, marker="o" if len(steps) < 15 else None, markersize=4)
        axes.set_title(name)

    return draw


_TRAINING = {
    "loss": [("actor/loss", "loss")],
    "gradient norm (before clipping)": [("actor/grad_norm", "gradient norm")],
    "entropy (nats a token)": [("actor/entropy", "entropy")],
    "KL (nats a token)": [
        ("actor/kl", "to the behaviour policy"),
        ("actor/kl_loss", "to the reference"),
        ("mismatch/kl/mean", "engine to trainer"),
    ],
    "update of the weights (share of their norm)": [("actor/update_ratio", "update")],
    "published weights that a step changed (share)": [("actor/published_change/share", "share")],
    "log-probability of what was rewarded (change, nats a token)": [("actor/rewarded_logprob_change", "change")],
    "equal-reward groups (share)": [("groups/equal_reward/share", "share")],
    "staleness (steps)": [("staleness/mean", "mean"), ("staleness/max", "max")],
}
_LENGTH = {
    "reply length (tokens)": [("response_length/mean", "mean"), ("response_length/max", "max"), ("response_length/min", "min")],
    "turns a rollout": [("num_turns/mean", "turns")],
}
_STEP_PARTS = (
    ("timing/train_s", "training"),
    ("timing/publish_s", "publishing weights"),
    ("timing/wait_batch_s", "waiting for a batch"),
)


def _named_panels(run: Run, wanted: dict[str, list[tuple[str, str]]], *, from_zero: bool = False) -> list[Draw]:
    """A panel for each title whose metrics (name, label) the run has."""
    found = {title: [(label, run.series(name)) for name, label in lines] for title, lines in wanted.items()}
    return [panel for title, lines in found.items() for panel in _lines(title, lines, from_zero=from_zero)]


def _lines(title: str, lines: list[tuple[str, Series]], *, from_zero: bool = False) -> list[Draw]:
    """Those (label, steps and values) that have values in one panel, if any; `from_zero` shows amounts in proportion instead of
    magnifying their changes."""
    known = [(label, series) for label, series in lines if series[0]]

    def draw(axes: "Axes") -> None:
        for (label, series), colour in zip(known, COLOURS, strict=False):
            _curve(axes, *series, colour=colour, label=label if len(known) > 1 else None)
        axes.set_title(title)
        if from_zero:
            axes.set_ylim(bottom=0)
        if len(known) > 1:
            axes.legend(fontsize=7, frameon=False)

    return [draw] if known else []


def _line_panel(run: Run, name: str) -> Draw:
    """A training metric with its held-out counterpart."""
    what = name.split("/", 1)[1].removesuffix("/mean")

    def draw(axes: "Axes") -> None:
        _curve(axes, *run.series(name), colour=BLUE, label="training")
        _held_out(axes, run, run.names("val-aux/", f"/{what}/mean"))
        axes.set_title(what)

    return draw


def _reward_panels(run: Run) -> list[Draw]:
    panels: list[Draw] = []
    if run.series("critic/reward/mean")[0]:
        panels.append(lambda axes: _judged_reward(axes, run))
    for name in run.names("val-core/", "/mean"):

        def draw(axes: "Axes", name: str = name) -> None:
            _held_out(axes, run, [name], label=False)
            axes.set_title(f"held-out {name.removeprefix('val-core/').removesuffix('/mean')}")

        panels.append(draw)
    return panels


def _judged_reward(axes: "Axes", run: Run) -> None:
    """The training reward, with the two windows whose difference was judged."""
    _curve(axes, *run.series("critic/reward/mean"), colour=BLUE, label=None)
    trend = run.learning.reward
    if trend is not None:
        shift = trend.fall if trend.fell and trend.fall is not None else trend.rise
        label = f"{shift.difference:+.3g}" + (f" ({shift.errors:+.1f} standard errors)" if math.isfinite(shift.errors) else "")
        axes.hlines(shift.before, *shift.steps_before, colors=RED, linewidth=2.5)
        axes.hlines(shift.after, *shift.steps_after, colors=RED, linewidth=2.5, label=label)
        axes.legend(fontsize=7, frameon=False)
    axes.set_title(f"training reward (mean of the batch): {run.learning.state}")


def _variety_panels(run: Run) -> list[Draw]:
    """How many different replies held-out tasks get: the curve of a policy that collapses to a constant falls to 0."""
    wanted = {
        "/distinct_replies/share": "distinct replies, held-out (share)",
        "/reply_entropy/mean": "entropy of first replies (nats)",
    }
    panels: list[Draw] = []
    for suffix, title in wanted.items():
        if names := run.names("val-aux/", suffix):

            def draw(axes: "Axes", names: list[str] = names, title: str = title) -> None:
                _held_out(axes, run, names, label=len(names) > 1)
                axes.set_title(title)
                axes.set_ylim(bottom=0)

            panels.append(draw)
    return panels


def _component_panels(run: Run) -> list[Draw]:
    return [_line_panel(run, name) for name in run.names("reward/", "/mean")]


def _timing_panels(run: Run) -> list[Draw]:
    panels: list[Draw] = []
    if run.series("timing/step_s")[0]:
        panels.append(lambda axes: _step_shares(axes, run))
    wanted = {
        "share of time idle": [("perf/trainer_idle/share", "trainer"), ("perf/engine_idle/share", "engine")],
        "places for rollouts kept empty (share)": [
            ("perf/held_by_staleness/share", "by max_staleness"),
            ("perf/held_by_load/share", "by the engines' load"),
            ("perf/held_by_evaluation/share", "by evaluations"),
        ],
        "sampled tokens/s": [("throughput/tokens_per_s", "tokens/s")],
    }
    rollouts, swaps = run.series("timing/rollout_s"), run.series("timing/swap_s")
    seconds = [("step", run.step_seconds()), ("rollouts", rollouts), ("weight swap", swaps)]
    return panels + _named_panels(run, wanted, from_zero=True) + _lines("seconds", seconds, from_zero=True)


def _step_shares(axes: "Axes", run: Run) -> None:
    """Where the trainer's step goes: parts that follow each other, as shares of the whole."""
    steps, totals = run.series("timing/step_s")
    parts = [
        [run.metrics[step].get(name, 0.0) / max(total, 1e-9) for step, total in zip(steps, totals, strict=True)]
        for name, _ in _STEP_PARTS
    ]
    rest = [max(0.0, 1.0 - sum(shares)) for shares in zip(*parts, strict=True)]
    labels = [label for _, label in _STEP_PARTS] + ["other"]
    bottom = [0.0] * len(steps)
    for values, label, colour in zip([*parts, rest], labels, (BLUE, GREEN, ORANGE, "#CCCCCC"), strict=True):
        axes.bar(steps, values, bottom=bottom, width=1.0, color=colour, label=label, linewidth=0)
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.set_ylim(0, max(1.0, *bottom))
    axes.set_title("where a step's time goes (share)")
    axes.legend(fontsize=7, loc="lower right", framealpha=0.9)


def _curve(axes: "Axes", steps: list[int], values: list[float], *, colour: str, label: str | None) -> None:
    """Every value faint, and a running mean over it where there are enough to smooth."""
    window = max(3, len(values) // SMOOTH_SHARE)
    if len(values) <= 2 * window:
        axes.plot(steps, values, color=colour, linewidth=1.5, marker="o", markersize=3, label=label)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(steps, smoothed(values, window), color=colour, linewidth=2, label=label)


def _held_out(axes: "Axes", run: Run, names: list[str], *, label: bool = True) -> None:
    for name, colour in zip(names, (RED, GREEN, PURPLE, ORANGE, BLUE, SKY), strict=False):
        steps, values = run.series(name)
        errors = [run.metrics[step].get(name.rsplit("/", 1)[0] + "/stderr", 0.0) for step in steps]
        text = ("held-out" if len(names) == 1 else f"held-out {name.split('/', 1)[1].rsplit('/', 2)[0]}") if label else None
        axes.errorbar(steps, values, yerr=errors, color=colour, fmt="o-", markersize=4, linewidth=1.2, capsize=3, label=text)
    if label and names:
        axes.legend(fontsize=7, frameon=False)


def grid(panels: Sequence[Draw], *, title: str, panel: tuple[float, float] = PANEL) -> "Figure":
    """Panels side by side, each `panel` inches, over optimiser steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(6.0, panel[0] * columns), panel[1] * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for index, draw in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, index)
        draw(axes)
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("optimiser step", fontsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return figure


def save(figure: "Figure", path: Path) -> Path:
    """Write a PNG and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path
