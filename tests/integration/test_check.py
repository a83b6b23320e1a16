"""`turnwise check` with a real engine and a real trainer: on a run that learns, and cut short."""

import json
import signal
import time
from pathlib import Path

import pytest

from support.rl_command import Rl, running, write_config
from turnwise.diagnose.checks import CHECKS

MODULE = "turnwise.cli.turnwise"
NAMES = [check.name for check in CHECKS if check.name != "overfit"]  # which is a run of its own, and has its own tests


def test_a_configuration_that_works_passes_every_check(tiny_model: Path, tmp_path: Path):
    config = write_config(tmp_path, tiny_model, max_steps=2)
    page = tmp_path / "page"
    only = ("--only", ",".join(NAMES), "--rollouts", "16")
    with running(tmp_path, "check", "@", str(config), *only, "--output", str(page), module=MODULE) as check:
        code = check.wait(300)
        assert code == 0, check.output()
        assert check.processes() == []
        output = check.output()
    content = json.loads((page / "check.json").read_text())
    assert [one["name"] for one in content["checks"]] == NAMES
    verdicts = {one["name"]: one["verdict"] for one in content["checks"]}
    assert {name for name, verdict in verdicts.items() if verdict in ("fail", "blocked")} == set()
    assert all(one["evidence"] for one in content["checks"])
    assert all(f"\n{mark}" in f"\n{output}" for mark in ("pass    plan", "pass    mask"))
    assert (page / "check.md").read_text().count("\n| ") == len(NAMES) + 1
    assert (page / "check-logs" / "inference.stdout").is_file()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_check_that_is_cut_short_leaves_no_engine(number: signal.Signals, tiny_model: Path, tmp_path: Path):
    config = write_config(tmp_path, tiny_model, max_steps=2)
    with running(tmp_path, "check", "@", str(config), "--only", "rollouts", module=MODULE) as check:
        check.wait_until(lambda: _engines(check) > 0)
        check.process.send_signal(number)
        assert check.wait(60) == (130 if number == signal.SIGINT else -number)
        deadline = time.monotonic() + 60  # the warden ends what a killed check has left, in its own time
        while check.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert check.processes() == []


def _engines(check: Rl) -> int:
    return sum("turnwise.inference.embedded" in " ".join(process.cmdline()) for process in check.processes())
