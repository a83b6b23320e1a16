"""What the user sees, from files that grow as those of a run do."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from turnwise.launch.child import Child
from turnwise.launch.ending import before_and_after, ending_lines
from turnwise.launch.live import BARS, LineView, bar, duration, rows, sparkline
from turnwise.launch.plan import ProcessSpec
from turnwise.launch.supervise import ExitCode, Outcome
from turnwise.launch.terminal import TerminalConsole, TerminalView
from turnwise.launch.watch import Progress, Watch
from turnwise.transport import RunDir


def append(root: Path, *records: dict[str, object]) -> None:
    with (root / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def step(number: int, reward: float) -> dict[str, object]:
    return {"step": number, "time": 100.0 + 10 * number, "critic/reward/mean": reward, "actor/loss": 0.5}


def held_out(number: int, reward: float) -> dict[str, object]:
    return {"step": number, "time": 0.0, "val-core/wordle/reward/mean": reward, "val-core/wordle/reward/stderr": 0.1}


def test_only_what_is_new_and_whole_is_read(tmp_path: Path):
    watch = Watch(RunDir(tmp_path), 10)
    assert watch.look() == []
    append(tmp_path, step(1, 0.25))
    assert [line.split(" | ")[:2] for line in watch.look()] == [["step 1/10", "reward 0.250"]]
    line = json.dumps(step(2, 0.5)) + "\n"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line[:20])
        file.flush()
        assert watch.look() == []
        file.write(line[20:])
    assert len(watch.look()) == 1
    assert watch.progress.step == 2


def test_the_end_is_estimated_from_the_median_step(tmp_path: Path):
    append(tmp_path, *[step(n, 0.0) for n in (1, 2, 3)], {**step(4, 0.0), "time": 500.0})
    watch = Watch(RunDir(tmp_path), 10)
    watch.look()
    assert watch.progress.remaining_s() == 60.0  # steps of 10, 10 and 370 s: six are left


def test_a_status_that_is_being_written_keeps_the_last_one(tmp_path: Path):
    watch = Watch(RunDir(tmp_path), 10)
    (tmp_path / "status.json").write_text('{"phase": "rollouts"}')
    watch.look()
    (tmp_path / "status.json").write_text('{"pha')
    watch.look()
    assert watch.progress.status == {"phase": "rollouts"}


def test_the_picture_has_everything_that_is_known(tmp_path: Path):
    append(tmp_path, held_out(0, -0.5), step(1, 0.1), {**step(2, 0.4), "groups/equal_reward/share": 0.25, "actor/grad_norm": 1.5})
    append(tmp_path, {"step": 2, "time": 0.0, "perf/trainer_idle/share": 0.03, "perf/engine_idle/share": 0.41})
    status = {
        "phase": "rollouts",
        "step": 3,
        "filled": 12,
        "batch_size": 32,
        "inflight": 20,
        "engines_waiting": 3.0,
        "held_by": "staleness",
        "tokens_per_s": 88.2,
        "version": 2,
        "lag": 1,
    }
    (tmp_path / "status.json").write_text(json.dumps(status))
    watch = Watch(RunDir(tmp_path), 4)
    watch.look()
    shown = dict(rows(watch.progress))
    assert shown["step"] == f"2 / 4  {'█' * 12}{'░' * 12}  20 s left"
    assert shown["now"] == "rollouts for step 3: 12 of 32"
    assert shown["reward"] == f"+0.400  {BARS[0]}{BARS[-1]}  first +0.100, best +0.400"
    assert shown["held out @0"] == "wordle/reward -0.500 ±0.100"
    assert shown["verdict"] == "too early: 2 steps so far"
    assert shown["learning"] == "loss 0.5000   grad norm 1.500"
    assert shown["rollouts"] == "equal groups 25%   88 tokens/s   20 in flight   3 wait in the engines"
    assert shown["waits"] == "trainer idle 3%   engines idle 41%   rollouts held back: they would be too old"
    assert shown["policy"] == "version 2, lag 1"


def test_a_terminal_shows_the_picture_and_what_is_said(tmp_path: Path):
    output = io.StringIO()
    view = TerminalView(Watch(RunDir(tmp_path), 4), "my run", Console(file=output, force_terminal=True, width=90))
    append(tmp_path, step(1, 0.1))
    view.say("inference serves after 3 s [not markup]")
    view.close()
    assert "my run" in output.getvalue()
    assert "inference serves after 3 s [not markup]" in output.getvalue()
    assert "1 / 4" in output.getvalue()


def rising(steps: int) -> list[dict[str, object]]:
    return [step(number, 0.02 * number + 0.01 * (number % 3)) for number in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("records", "told", "colour"),
    [
        (rising(40), "learning: the reward rose from", "1;32"),
        ([{**step(n, 0.5), "groups/equal_reward/share": 1.0} for n in range(1, 9)], "no signal: 100% of the groups", "1;35"),
        ([step(n, 0.5 + 0.1 * (n % 2)) for n in range(1, 50)], "flat: the reward was 0.5", "1;33"),
        ([step(n, 1.0 - 0.02 * n + 0.01 * (n % 3)) for n in range(1, 50)], "collapsing: the reward fell from", "1;31"),
    ],
)
def test_the_verdict_stands_in_the_picture_in_its_colour_and_at_the_end(
    tmp_path: Path, records: list[dict[str, object]], told: str, colour: str
):
    append(tmp_path, *records)
    output = io.StringIO()
    view = TerminalView(
        Watch(RunDir(tmp_path), 50), "x", Console(file=output, force_terminal=True, width=200, color_system="standard")
    )
    view.close()
    assert f"\x1b[{colour}m{told.split(':')[0]}\x1b[0m:{told.split(':')[1]}" in output.getvalue()
    lines = ending_lines(Outcome(ExitCode.DONE, "all steps done"), RunDir(tmp_path), view.watch.progress, "rl")
    assert lines[1].startswith(f"Verdict: {told}")
    assert any(line.startswith("What to do: ") for line in lines) != told.startswith("learning")


def test_lines_tell_a_verdict_when_it_changes(tmp_path: Path):
    output = io.StringIO()
    view = LineView(Watch(RunDir(tmp_path), 40), output)
    for record in rising(40):
        append(tmp_path, record)
        view.close()  # a look, as at the end
    verdicts = [line for line in output.getvalue().splitlines() if line.startswith("Verdict")]
    assert len(verdicts) == 1
    assert verdicts[0].startswith("Verdict at step 18: learning: the reward rose from")
    resumed = io.StringIO()
    LineView(Watch(RunDir(tmp_path), 40), resumed).close()
    assert resumed.getvalue() == ""


def test_lines_are_written_once_and_old_ones_not_at_all(tmp_path: Path):
    append(tmp_path, step(1, 0.1))
    output = io.StringIO()
    view = LineView(Watch(RunDir(tmp_path), 4), output)
    append(tmp_path, step(2, 0.2))
    view.update([])
    view.close()
    steps = [line for line in output.getvalue().splitlines() if line.startswith("step")]
    assert [line.split(" | ")[0] for line in steps] == ["step 2/4"]


class Placed:
    """As much of a child as the picture reads."""

    healthy = True

    def __init__(self, name: str, *gpus: int) -> None:
        self.name = name
        self.spec = ProcessSpec(name, (), {}, Path(), Path(), gpus)


def test_the_picture_tells_which_gpu_is_whose(tmp_path: Path):
    watch = Watch(RunDir(tmp_path), 4)
    children = [cast(Child, Placed(*placed)) for placed in (("inference", 0), ("trainer", 1, 2), ("orchestrator",))]
    assert dict(rows(watch.progress, children))["on"] == "inference GPU 0   trainer GPU 1, 2   orchestrator CPU"
    assert "on" not in dict(rows(watch.progress, children[2:]))


class Broken(io.StringIO):
    def write(self, _text: str) -> int:
        raise BrokenPipeError


def test_a_closed_terminal_does_not_end_the_run(tmp_path: Path):
    for view in (
        LineView(Watch(RunDir(tmp_path), 4), Broken()),
        TerminalView(Watch(RunDir(tmp_path), 4), "x", TerminalConsole(file=io.StringIO(), force_terminal=True)),
    ):
        if isinstance(view, TerminalView):
            view._live.console.file = Broken()  # pyright: ignore[reportPrivateUsage]
        view.say("one")
        view.update([])
        view.close()


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=100))
def test_a_sparkline_has_its_lowest_and_highest_bar(values: list[float]):
    line = sparkline(values, width=16)
    assert len(line) == min(len(values), 16)
    if max(values) - min(values) > 1e-3 and len(values) <= 16:
        assert {BARS[0], BARS[-1]} <= set(line)


@pytest.mark.parametrize(("done", "total", "text"), [(0, 4, "░░░░"), (2, 4, "██░░"), (4, 4, "████"), (0, 0, "░░░░")])
def test_a_bar_is_filled_in_proportion(done: int, total: int, text: str):
    assert bar(done, total, 4) == text


@pytest.mark.parametrize(("seconds", "text"), [(4, "4 s"), (89, "89 s"), (600, "10 min"), (12000, "3 h 20 min")])
def test_durations_are_short(seconds: float, text: str):
    assert duration(seconds) == text


def test_the_end_tells_the_likely_cause(tmp_path: Path):
    outcome = Outcome(ExitCode.FAILED, "inference ended with exit code 1", (), "ValueError: x\nWhat helps: y.")
    lines = ending_lines(outcome, RunDir(tmp_path), Progress(9), "rl @ x --resume")
    assert "Likely cause: ValueError: x\nWhat helps: y." in lines
    assert not any("Likely" in line for line in ending_lines(replace(outcome, cause=None), RunDir(tmp_path), Progress(9), "rl"))


def test_the_end_tells_before_and_after(tmp_path: Path):
    append(tmp_path, held_out(0, -0.5), step(1, 0.1), held_out(2, 0.75))
    watch = Watch(RunDir(tmp_path), 2)
    watch.look()
    assert before_and_after(watch.progress) == ["Held out, wordle/reward: -0.500 ± 0.100 at step 0 -> 0.750 ± 0.100 at step 2"]


@pytest.mark.parametrize(("code", "heading"), [(ExitCode.INTERRUPTED, "Interrupted"), (ExitCode.FAILED, "Failed")])
def test_a_run_that_was_cut_says_how_to_go_on(tmp_path: Path, code: ExitCode, heading: str):
    outcome = Outcome(code, "the reason", ("last", "words"))
    without = ending_lines(outcome, RunDir(tmp_path), Progress(4), "rl @ x.toml --resume")
    assert without[-1] == "Go on with: rl @ x.toml --resume  (no checkpoint yet: from the recorded batches)"
    (tmp_path / "checkpoints" / "step_2").mkdir(parents=True)
    lines = ending_lines(outcome, RunDir(tmp_path), Progress(4), "rl @ x.toml --resume")
    assert lines[:6] == ["", "Its last lines:", "  last", "  words", "", f"{heading} at step 0 of 4: the reason"]
    assert lines[-2:] == [f"Checkpoint: {tmp_path}/checkpoints/step_2", "Go on with: rl @ x.toml --resume"]
