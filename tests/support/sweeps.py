"""Sweeps of fake runs: the sweep file, the script of the stand-in for `rl`, the sweep itself here or in a process of its own."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from turnwise.launch.supervise import ExitCode
from turnwise.launch.sweep.plan import SweepPlan, plan_sweep, read_sweep
from turnwise.launch.sweep.run import SweepOptions, run_sweep
from turnwise.launch.sweep.runner import Sweeper
from turnwise.launch.sweep.view import LineView
from turnwise.report import sweep_page
from turnwise.report.sweep import RunState

FAKE_RL = Path(__file__).with_name("fake_rl.py")
BASE = """
max_steps = 4
[[orchestrator.env]]
id = "wordle"
"""
SWEEP = """
name = "planted"
output_dir = "{root}/sweep"
files = ["base.toml"]
metric = "val-core/openai/gsm8k/acc/mean"
percent = true
{keys}
"""
POLL_S = 0.02
Acts = Mapping[str, Sequence[dict[str, Any]]]  # run -> what its starts do, in the words of fake_rl
DEADLINE_S = 60.0


class Fakes:
    """A folder with a sweep file and a script for the stand-in."""

    def __init__(self, root: Path, *runs: str, keys: str = "", acts: Acts | None = None) -> None:
        self.root = root
        (root / "base.toml").write_text(BASE)
        listed = [run if "\n" in run else f'[[run]]\nid = "{run}"\n' for run in runs]
        self.file = root / "sweep.toml"
        self.file.write_text(SWEEP.format(root=root, keys=keys) + "\n".join(listed))
        self.script = root / "script.json"
        self.acts(acts or {})
        self.said = io.StringIO()

    @property
    def sweep_root(self) -> Path:
        return self.root / "sweep"

    @property
    def rl(self) -> list[str]:
        return [sys.executable, str(FAKE_RL), str(self.script)]

    def acts(self, acts: Acts) -> None:
        self.script.write_text(json.dumps(acts))

    def plan(self, *flags: str, seeds: int | None = None, only: Sequence[str] = ()) -> SweepPlan:
        sweep, tables = read_sweep(["@", str(self.file), *flags], seeds=seeds)
        return plan_sweep(sweep, tables, only=only)

    def sweeper(self, *flags: str, seeds: int | None = None) -> Sweeper:
        return Sweeper(self.plan(*flags, seeds=seeds), LineView(self.said), rl=self.rl, poll_s=POLL_S)

    def run(self, *flags: str, seeds: int | None = None, retry: bool = False) -> ExitCode:
        """The whole sweep, here."""
        return self.sweeper(*flags, seeds=seeds).run(retry=retry)

    def folder(self, label: str) -> Path:
        return self.sweep_root / "runs" / label

    def calls(self) -> list[dict[str, Any]]:
        """What the stand-in was called with, in order; `mode` says how it was to begin."""
        file = self.script.with_suffix(".calls")
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        modes = {"--resume": "resume", "--clean": "rerun"}
        return [{**call, "mode": next((mode for flag, mode in modes.items() if flag in call["args"]), "new")} for call in calls]

    def starts(self) -> list[tuple[str, str]]:
        return [(call["run"], call["mode"]) for call in self.calls()]

    def status(self) -> dict[str, dict[str, Any]]:
        """status.json by run."""
        return {row["label"]: row for row in json.loads((self.sweep_root / "status.json").read_text())["runs"]}

    def states(self) -> dict[str, str]:
        return {label: row["state"] for label, row in self.status().items()}

    @contextlib.contextmanager
    def process(self) -> Generator["subprocess.Popen[bytes]"]:
        """The sweep in a process of its own, with its output in sweep.log; nothing of it is left at the end of the block."""
        argv = [sys.executable, "-m", "support.sweeps", str(self.script), "@", str(self.file)]
        path = os.pathsep.join([str(FAKE_RL.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        with (self.root / "sweep.log").open("ab") as output:
            process = subprocess.Popen(
                argv, env={**os.environ, "PYTHONPATH": path}, stdout=output, stderr=output, start_new_session=True
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()
            for call in self.calls():
                with contextlib.suppress(psutil.Error):
                    left = psutil.Process(call["pid"])
                    if str(self.script) in left.cmdline():
                        left.kill()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def interrupt(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGINT)


COMPLETE = str(RunState.COMPLETE)

if __name__ == "__main__":
    sweep_page.draw_sweep = lambda *_args, **_settings: []  # pictures have tests of their own, and take a second each
    fake = [sys.executable, str(FAKE_RL), sys.argv[1]]
    sys.exit(run_sweep(sys.argv[2:], SweepOptions(plain=True), rl=fake, poll_s=POLL_S))
