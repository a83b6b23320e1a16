"""What the user sees of a sweep: a table for the width there is, or lines."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from support.planted_run import plant_run
from support.sweeps import Fakes
from turnwise.cli.turnwise import run_command
from turnwise.config.sweep import SweepConfig
from turnwise.launch.sweep.evidence import gather
from turnwise.launch.sweep.view import SIGN_OF_LIFE_S, LineView, TableView, render
from turnwise.launch.terminal import TerminalConsole
from turnwise.report.sweep import RunState, Score, SweepRow

SWEEP = SweepConfig.model_validate(
    {"name": "seven", "output_dir": "x", "metric": "m", "percent": True, "run": [{"id": "e6b", "title": "MXFP4, LoRA, AQN"}]}
)
RUNNING = SweepRow("e6b-s0", "e6b", "MXFP4, LoRA, AQN", 0, Path("/r"), RunState.RUNNING, step=12, max_steps=58, started=1.79e9)
DONE = SweepRow("e6b-s1", "e6b", "MXFP4, LoRA, AQN", 1, Path("/r"), RunState.COMPLETE, "", 58, 58, (Score(0.7324, 58, 0.0122),))
EARLY = SweepRow("e6b-s2", "e6b", "", 2, Path("/r"), RunState.ENDED_EARLY, "step 40 of 58, exit code 1", 40, 58, attempts=2)


def drawn(width: int, *rows: SweepRow) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render(SWEEP, rows, width))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_and_says_who_is_where(width: int):
    text = drawn(width, replace(RUNNING, verdict="collapsing"), DONE, EARLY)
    assert max(map(len, text.splitlines())) <= width
    for expected in ("12/58", "running", "complete", "e6b-s2: step 40 of 58, exit code 1 (2 starts)", "Ctrl-C: stop"):
        assert expected in text
    assert ("MXFP4, LoRA, AQN" in text) == (width == 160)
    assert ("collapsing" in text) == (width > 80)
    assert "73.24 ± 1.22" in drawn(160, DONE)
    assert "Ctrl-C" not in drawn(width, DONE)


def test_the_verdict_is_that_of_the_runs_metrics(tmp_path: Path):
    assert gather(plant_run(tmp_path / "run")).verdict == "learning"
    assert gather(plant_run(tmp_path / "flat", components={"win": lambda x: 0.5})).verdict == "flat"
    assert gather(tmp_path / "none").verdict == ""


def test_lines_are_told_once_and_life_is_shown_now_and_then():
    out, now = io.StringIO(), [0.0]
    view = LineView(out, now=lambda: now[0])
    view.say("e6b-s0 begins")
    view.update([RUNNING, DONE])
    now[0] = SIGN_OF_LIFE_S + 1
    view.update([RUNNING, DONE])
    view.update([RUNNING, DONE])
    assert out.getvalue() == "e6b-s0 begins\n1 of 2 runs complete; running: e6b-s0 12/58\n"


class Terminal(io.StringIO):
    """A terminal that somebody closes."""

    closed_by_user = False

    def write(self, text: str) -> int:
        if self.closed_by_user:
            raise BrokenPipeError
        return super().write(text)


def test_a_terminal_that_is_closed_ends_nothing():
    out = Terminal()
    lines, table = LineView(out), TableView(SWEEP, TerminalConsole(file=out, force_terminal=True))
    out.closed_by_user = True
    for view in (lines, table):
        view.say("one")
        view.update([DONE])
        view.say("two")
        view.close()
    assert "one" not in out.getvalue()


def test_the_table_is_redrawn_when_a_row_changes_and_not_otherwise():
    file = io.StringIO()
    view = TableView(SWEEP, Console(file=file, force_terminal=True, width=100))
    view.update([RUNNING])
    length = len(file.getvalue())
    view.update([RUNNING])
    assert len(file.getvalue()) == length
    view.say("something happened")
    view.update([DONE])
    view.close()
    assert "something happened" in file.getvalue()
    assert "complete" in file.getvalue()


def test_the_command_line_prints_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    fakes = Fakes(tmp_path, "a", "b")
    command = [
        "sweep",
        "@",
        str(fakes.file),
        "--dry-run",
        "--seeds",
        "2",
        "--only",
        "b",
        "--trainer.optim.lr",
        "1e-4",
        "--max-steps",
        "6",
    ]
    assert run_command(command) == 0
    text = capsys.readouterr().out
    assert "planted: 2 runs, one after the other; seeds 0, 1" in text
    assert "6 steps = " in text
    assert "12 optimiser steps in all" in text
    assert not fakes.sweep_root.exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["sweep"], "no sweep file"),
        (["sweep", "@", "none.toml"], "none.toml: no such file"),
        (["sweep", "@", "none.toml", "--seeds", "0"], "--seeds 0: at least one seed is needed"),
        (["sweep", "@", "SWEEP", "--seed", "3"], "seed of a run is given by the sweep"),
        (["sweep", "@", "SWEEP", "--trainer.optim.lrr", "3"], "trainer.optim.lrr"),
    ],
)
def test_the_command_line_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], words: str):
    fakes = Fakes(tmp_path, "a")
    assert run_command([str(fakes.file) if arg == "SWEEP" else arg for arg in args]) == 2
    assert words in capsys.readouterr().err
