"""What the user sees of a sweep: a table that redraws itself on a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from turnwise.config.sweep import SweepConfig
from turnwise.launch.live import Lines
from turnwise.launch.terminal import LivePicture, terminal_console
from turnwise.report.sweep import RunState, SweepRow
from turnwise.report.sweep_tables import remark, status_table

COLOURS = {
    RunState.PENDING: "dim",
    RunState.RUNNING: "bold cyan",
    RunState.COMPLETE: "green",
    RunState.ENDED_EARLY: "yellow",
    RunState.FAILED: "bold red",
}
WIDE = 150  # columns of a terminal that shows what each run is, too
MEDIUM = 100  # and of one that shows whether it learns
SIGN_OF_LIFE_S = 60.0  # between two lines about the same runs


class LineView:
    """A line for each event, and now and then one about the runs that go on; for logs, pipes and CI."""

    def __init__(self, stream: TextIO | None = None, *, now: Callable[[], float] = time.monotonic) -> None:
        self._lines = Lines(stream)
        self._now = now
        self._told = now()

    def say(self, text: str) -> None:
        self._told = self._now()
        self._lines.say(text)

    def update(self, rows: Sequence[SweepRow]) -> None:
        if self._now() - self._told < SIGN_OF_LIFE_S:
            return
        running = [f"{row.label} {row.step}/{row.max_steps or '?'}" for row in rows if row.state is RunState.RUNNING]
        done = sum(row.state is RunState.COMPLETE for row in rows)
        self.say(f"{done} of {len(rows)} runs complete; running: {', '.join(running) or 'none'}")

    def close(self) -> None:
        """Nothing is left open."""


class TableView:
    """The table, redrawn as it changes; what is said scrolls by above it."""

    def __init__(self, sweep: SweepConfig, console: Console) -> None:
        self._sweep = sweep
        self._rows: Sequence[SweepRow] = ()
        self._live = LivePicture(Text("looking at the runs"), console)

    def say(self, text: str) -> None:
        self._live.say(text)

    def update(self, rows: Sequence[SweepRow]) -> None:
        if rows != self._rows:
            self._rows = rows
            self._live.show(render(self._sweep, rows, self._live.console.width))

    def close(self) -> None:
        self._live.close()


def render(sweep: SweepConfig, rows: Sequence[SweepRow], width: int) -> Group:
    """The state as a table for `width` columns, remarks below it."""
    content = status_table(sweep, rows)
    left_out = {"remark"} if width >= WIDE else {"remark", "what"} if width >= MEDIUM else {"remark", "what", "verdict"}
    shown = [at for at, head in enumerate(content.heads) if head not in left_out]
    table = Table(title=sweep.name, title_justify="left")
    for at in shown:
        table.add_column(content.heads[at], justify="right" if at in content.numbers else "left", overflow="fold")
    for row, cells in zip(rows, content.rows, strict=True):
        texts = [cells[at][len("2026-") :] if content.heads[at] in ("start", "end") else cells[at] for at in shown]
        table.add_row(*(Text(text) for text in texts), style=COLOURS[row.state])
    remarks = [Text(f"{row.label}: {text}") for row in rows if (text := remark(row))]
    hint = [Text("Ctrl-C: stop with checkpoints; the same command goes on", style="dim")]
    return Group(table, *remarks, *(hint if any(row.state is RunState.RUNNING for row in rows) else []))


def make_view(sweep: SweepConfig, *, plain: bool) -> LineView | TableView:
    """The table where stdout is a terminal that can draw it, lines elsewhere."""
    if plain or not sys.stdout.isatty():
        return LineView()
    console = terminal_console()
    return TableView(sweep, console) if console.is_terminal and not console.is_dumb_terminal else LineView()
