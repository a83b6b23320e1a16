"""What the user sees while a run goes on: a line a step, or on a terminal the rows of a picture (drawn in `terminal`)."""

import itertools
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from turnwise.launch.child import Child
from turnwise.launch.watch import Progress, Watch

if TYPE_CHECKING:
    from turnwise.launch.terminal import TerminalView

BARS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32
LOOK_S = 0.5  # between two looks at the files
VERDICT = "verdict"  # label of the row that says what the run does
HELD_BY = {"load": "engines are saturated", "staleness": "they would be too old", "evaluation": "evaluations have the adapters"}
SIGN_OF_LIFE_S = 30.0  # without a terminal: at most so long without a line


class Lines:
    """Lines on a stream. A reader that goes away, with a closed terminal or pipe, ends nothing."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._closed = False

    def say(self, text: str) -> None:
        if self._closed:
            return
        try:
            print(text, file=self._stream, flush=True)
        except OSError:
            self._closed = True


class LineView:
    """A line for each step and event; for logs, pipes and CI."""

    def __init__(self, watch: Watch, stream: TextIO | None = None) -> None:
        self.watch = watch
        self._lines = Lines(stream)
        self._next_look = 0.0
        self._last_line = time.monotonic()
        self._phase = ""
        watch.look()  # what a resumed run had before is not news
        self._told = watch.progress.learning.state

    def say(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._lines.say(text)

    def update(self, children: Sequence[Child]) -> None:
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_S
        self._say_news()
        phase = self._phase_to_tell(children)
        if phase != self._phase or time.monotonic() - self._last_line > SIGN_OF_LIFE_S:
            self._phase = phase
            self.say(phase_text(self.watch.progress, children))

    def close(self) -> None:
        self._say_news()

    def _say_news(self) -> None:
        """A line for each new record, and one for a verdict that has changed."""
        for line in self.watch.look():
            self.say(line)
        learning = self.watch.progress.learning
        if learning.state is not self._told:
            self._told = learning.state
            self.say(learning.line)

    def _phase_to_tell(self, children: Sequence[Child]) -> str:
        """The phase; once steps come in, only evaluations: the phases within a step would drown its line."""
        waiting = "".join(child.name for child in children if not child.healthy)
        phase = str(self.watch.progress.status.get("phase", "")) + waiting
        return phase if self.watch.progress.step == 0 or phase.startswith("evaluating") else self._phase


def make_view(watch: Watch, title: str, *, plain: bool) -> "LineView | TerminalView":
    """The picture where stdout is a terminal that can draw it, lines elsewhere."""
    if plain or not sys.stdout.isatty():
        return LineView(watch)
    from turnwise.launch.terminal import TerminalView, terminal_console

    console = terminal_console()
    return TerminalView(watch, title, console) if console.is_terminal and not console.is_dumb_terminal else LineView(watch)


def rows(progress: Progress, children: Sequence[Child] = ()) -> list[tuple[str, str]]:
    """Label and value of each line of the picture; what is not known yet is left out."""
    metrics, status = progress.metrics, progress.status
    lines = [("step", f"{progress.step} / {progress.max_steps}  {bar(progress.step, progress.max_steps)}{_eta(progress)}")]
    lines.append(("now", phase_text(progress, children)))
    if any(child.spec.gpus for child in children):
        lines.append(("on", "   ".join(f"{child.name} {child.spec.place}" for child in children)))
    if progress.rewards or progress.evals:
        lines.append((VERDICT, str(progress.learning)))
    if progress.rewards:
        values = [progress.rewards[step] for step in sorted(progress.rewards)]
        lines.append(("reward", f"{values[-1]:+.3f}  {sparkline(values)}  first {values[0]:+.3f}, best {max(values):+.3f}"))
    for step, scores in sorted(progress.evals.items())[-2:]:
        lines.append((f"held out @{step}", ", ".join(_scores(scores))))
    learning = [("loss", "actor/loss", ".4f"), ("grad norm", "actor/grad_norm", ".3f"), ("entropy", "actor/entropy", ".3f")]
    speed = [("equal groups", "groups/equal_reward/share", ".0%"), ("reply", "response_length/mean", ".0f")]
    idle = [("trainer idle", "perf/trainer_idle/share", ".0%"), ("engines idle", "perf/engine_idle/share", ".0%")]
    for label, names in (("learning", learning), ("rollouts", speed), ("waits", idle)):
        shown = [f"{name} {metrics[metric]:{form}}" for name, metric, form in names if metric in metrics]
        if label == "rollouts":
            shown += _engine_numbers(progress)
        if label == "waits" and (reason := HELD_BY.get(str(status.get("held_by")))):
            shown.append(f"rollouts held back: {reason}")
        if shown:
            lines.append((label, "   ".join(shown)))
    if "version" in status:
        lines.append(("policy", f"version {status['version']}, lag {status.get('lag', 0)}"))
    return lines


def phase_text(progress: Progress, children: Sequence[Child] = ()) -> str:
    """What the run is doing, in words."""
    waiting = [child for child in children if not child.healthy]
    status = progress.status
    phase = str(status.get("phase", ""))
    if waiting and phase in ("", "waiting for weights"):
        seconds = max(time.monotonic() - child.started for child in waiting)
        return f"waiting for {', '.join(child.name for child in waiting)} to serve ({seconds:.0f} s)"
    if phase == "rollouts":
        return f"rollouts for step {status.get('step', '?')}: {status.get('filled', 0)} of {status.get('batch_size', '?')}"
    if phase == "evaluating":
        return f"evaluating on held-out tasks: {status.get('eval_done', 0)} of {status.get('eval_total', '?')}"
    return phase or "starting"


def bar(done: int, total: int, width: int = 24) -> str:
    """`████░░░░`"""
    full = round(width * done / total) if total else 0
    return "█" * full + "░" * (width - full)


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """Values as a row of bars, from their least to their greatest; neighbours are averaged where there are more than fit."""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(values), max(values)
    span = high - low
    return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] if span else BARS[0] for value in values)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _eta(progress: Progress) -> str:
    seconds = progress.remaining_s()
    return "" if seconds is None else f"  {duration(seconds)} left"


def _scores(scores: dict[str, float]) -> list[str]:
    shown: list[str] = []
    for name, value in sorted(scores.items()):
        if name.endswith("/mean"):
            stderr = scores.get(name.removesuffix("mean") + "stderr")
            label = name.removeprefix("val-core/").removesuffix("/mean")
            shown.append(f"{label} {value:+.3f}" + (f" ±{stderr:.3f}" if stderr is not None else ""))
    return shown


def _engine_numbers(progress: Progress) -> list[str]:
    shown: list[str] = []
    rate = progress.status.get("tokens_per_s") or progress.metrics.get("throughput/tokens_per_s")
    if rate:
        shown.append(f"{rate:.0f} tokens/s")
    if "inflight" in progress.status:
        shown.append(f"{progress.status['inflight']} in flight")
    if waiting := progress.status.get("engines_waiting"):
        shown.append(f"{waiting:.0f} wait in the engines")
    return shown
