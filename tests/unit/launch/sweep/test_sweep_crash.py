"""Sweeps in processes of their own that are killed, interrupted and started again."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil

from support.sweeps import COMPLETE, Fakes, interrupt, wait_until
from turnwise.launch.supervise import ExitCode

SECOND = {"do": "finish"}


def held(fakes: Fakes, at: int) -> dict[str, Any]:
    """A run that stands still after a step until the file `go` is there."""
    return {"do": "finish", "at": at, "hold": str(fakes.root / "go")}


def at_step(fakes: Fakes, label: str, step: int) -> bool:
    """Whether the sweep has seen the run come so far."""
    file = fakes.sweep_root / "status.json"
    if not file.exists():
        return False
    row = {row["label"]: row for row in json.loads(file.read_text())["runs"]}[label]
    return row["state"] == "running" and row["step"] == step


def evaluations(fakes: Fakes, label: str) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in (fakes.folder(label) / "evals").iterdir())


def test_after_kill_9_in_the_middle_the_run_that_goes_on_is_taken_over_and_nothing_is_done_twice(tmp_path: Path):
    fakes = Fakes(tmp_path, "a", "b", "c")
    fakes.acts({"b-s0": [held(fakes, 2)]})
    with fakes.process() as first:
        wait_until(lambda: at_step(fakes, "b-s0", 2))
        first.kill()
        first.wait()
        assert fakes.states() == {"a-s0": COMPLETE, "b-s0": "running", "c-s0": "pending"}
        with fakes.process() as second:
            wait_until(lambda: "b-s0 runs already: taken over" in (tmp_path / "sweep.log").read_text())
            (tmp_path / "go").touch()
            assert second.wait(60) == ExitCode.DONE
    assert fakes.starts() == [("a-s0", "new"), ("b-s0", "new"), ("c-s0", "new")]
    assert set(fakes.states().values()) == {COMPLETE}
    assert fakes.status()["b-s0"]["attempts"] == 1


def test_after_a_reboot_the_run_that_was_cut_off_goes_on_and_the_cut_counts_as_no_failure(tmp_path: Path):
    fakes = Fakes(tmp_path, "a", "b", keys="max_attempts = 1")
    fakes.acts({"a-s0": [held(fakes, 2), SECOND]})
    with fakes.process() as first:
        wait_until(lambda: at_step(fakes, "a-s0", 2))
        first.kill()  # everything at once, as a machine that goes down
        os.kill(fakes.calls()[0]["pid"], signal.SIGKILL)
        first.wait()
        wait_until(lambda: not psutil.pid_exists(fakes.calls()[0]["pid"]))
        with fakes.process() as second:
            assert second.wait(60) == ExitCode.DONE
    assert fakes.starts() == [("a-s0", "new"), ("a-s0", "resume"), ("b-s0", "new")]
    assert evaluations(fakes, "a-s0") == [0, 2, 4]
    assert set(fakes.states().values()) == {COMPLETE}


def test_ctrl_c_ends_the_runs_with_a_checkpoint_and_the_same_command_goes_on(tmp_path: Path):
    fakes = Fakes(tmp_path, "a", "b", keys="gpu_sets = [[], []]\nmax_attempts = 1")
    fakes.acts({"a-s0": [held(fakes, 1), SECOND], "b-s0": [held(fakes, 2), SECOND]})
    with fakes.process() as sweep:
        wait_until(lambda: at_step(fakes, "a-s0", 1) and at_step(fakes, "b-s0", 2))
        interrupt(sweep)
        assert sweep.wait(60) == ExitCode.INTERRUPTED
        assert not any(psutil.pid_exists(call["pid"]) for call in fakes.calls())
        assert fakes.states() == {"a-s0": "ended early", "b-s0": "ended early"}
        assert fakes.status()["a-s0"]["reason"] == "interrupted at step 1 of 4: interrupted by the user"
        with fakes.process() as again:
            assert again.wait(60) == ExitCode.DONE
    assert sorted(fakes.starts()) == [(label, mode) for label in ("a-s0", "b-s0") for mode in ("new", "resume")]
    assert set(fakes.states().values()) == {COMPLETE}


def test_ctrl_c_reaches_a_run_that_was_taken_over(tmp_path: Path):
    fakes = Fakes(tmp_path, "a")
    fakes.acts({"a-s0": [held(fakes, 1)]})
    with fakes.process() as first:
        wait_until(lambda: at_step(fakes, "a-s0", 1))
        first.kill()
        first.wait()
        with fakes.process() as second:
            wait_until(lambda: "taken over" in (tmp_path / "sweep.log").read_text())
            interrupt(second)
            assert second.wait(60) == ExitCode.INTERRUPTED
    assert fakes.states() == {"a-s0": "ended early"}
    assert json.loads((fakes.folder("a-s0") / "control" / "stop.json").read_text())["kind"] == "interrupted"


def test_an_rl_that_somebody_else_interrupts_is_left_until_the_next_sweep(tmp_path: Path):
    fakes = Fakes(tmp_path, "a", "b")
    fakes.acts({"a-s0": [held(fakes, 1), SECOND]})
    with fakes.process() as sweep:
        wait_until(lambda: at_step(fakes, "a-s0", 1))
        os.kill(fakes.calls()[0]["pid"], signal.SIGINT)
        assert sweep.wait(60) == ExitCode.FAILED
    assert fakes.states() == {"a-s0": "ended early", "b-s0": COMPLETE}
    assert fakes.starts() == [("a-s0", "new"), ("b-s0", "new")]
    assert fakes.run() is ExitCode.DONE
    assert fakes.starts()[2:] == [("a-s0", "resume")]
