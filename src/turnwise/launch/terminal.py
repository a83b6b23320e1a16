"""The live picture of a run on a terminal, drawn by rich."""

import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from turnwise.launch.child import Child
from turnwise.launch.live import LOOK_S, VERDICT, rows
from turnwise.launch.watch import Watch
from turnwise.monitor import State

COLOURS = {
    State.LEARNING: "bold green",
    State.FLAT: "bold yellow",
    State.COLLAPSING: "bold red",
    State.NO_SIGNAL: "bold magenta",
    State.TOO_EARLY: "dim",
}


class TerminalConsole(Console):
    """A console whose reader may go away: rich would end the process then."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def terminal_console() -> Console:
    """The console on stdout."""
    return TerminalConsole()


class LivePicture:
    """A picture that is redrawn in place; what is said scrolls by above it. A terminal that was closed ends nothing."""

    def __init__(self, first: RenderableType, console: Console) -> None:
        self.console = console
        self._closed = False
        self._live = Live(first, console=console, auto_refresh=False)
        self._live.start()

    def say(self, text: str) -> None:
        self._draw(lambda: self.console.print(text, highlight=False, markup=False))

    def show(self, picture: RenderableType) -> None:
        """Draw it instead of the one before."""
        self._draw(lambda: self._live.update(picture, refresh=True))

    def close(self) -> None:
        self._draw(self._live.stop)

    def _draw(self, draw: Callable[[], None]) -> None:
        if self._closed:
            return
        try:
            draw()
        except OSError:
            self._closed = True


class TerminalView:
    """What a run does, redrawn as it goes on."""

    def __init__(self, watch: Watch, title: str, console: Console) -> None:
        self.watch = watch
        self._title = title
        self._next_look = 0.0
        watch.look()
        self._live = LivePicture(self._picture([]), console)

    def say(self, text: str) -> None:
        self._live.say(text)

    def update(self, children: Sequence[Child]) -> None:
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_S
        self.watch.look()
        self._live.show(self._picture(children))

    def close(self) -> None:
        self.watch.look()
        self._live.show(self._picture([]))
        self._live.close()

    def _picture(self, children: Sequence[Child]) -> Panel:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", justify="right")
        table.add_column(ratio=1)
        state = self.watch.progress.learning.state
        for label, value in rows(self.watch.progress, children):
            text = Text(value)
            if label == VERDICT:
                text.stylize(COLOURS[state], 0, len(state))
            table.add_row(label, text)
        return Panel(
            table, title=self._title, title_align="left", subtitle="Ctrl-C: stop with a checkpoint", subtitle_align="right"
        )
