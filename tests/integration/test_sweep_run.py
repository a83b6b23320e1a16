"""A sweep of real runs on the CPU that is cut off in the middle and started again: the table at its end is right."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.rl_command import Rl, running, write_config
from turnwise.report import load_metrics

METRIC = "val-core/wordle/reward/mean"
SWEEP = """
name = "two runs"
output_dir = "sweep"
files = ["run.toml"]
metric = "{metric}"
plots = ["critic/reward/mean"]
compare = [["fast", "slow"]]
[overrides.ckpt]
interval = 1
[[run]]
id = "slow"
[run.overrides.trainer.optim]
lr = 1e-4
[[run]]
id = "fast"
title = "a hundred times the learning rate"
"""


def sweeping(folder: Path) -> Any:
    return running(folder, "sweep", "@", "sweep.toml", "--plain", module="turnwise.cli.turnwise")


def step_of(folder: Path, label: str) -> int:
    metrics = load_metrics(folder / "sweep" / "runs" / label)
    return max((step for step, values in metrics.items() if "actor/loss" in values), default=0)


@pytest.mark.timeout(600)
def test_two_runs_of_two_steps_cut_off_and_taken_up_again_end_in_the_right_table(tmp_path: Path, tiny_model: Path):
    write_config(tmp_path, tiny_model, max_steps=2)
    (tmp_path / "sweep.toml").write_text(SWEEP.format(metric=METRIC))
    with sweeping(tmp_path) as first:
        first.wait_until(lambda: (tmp_path / "sweep/runs/slow-s0/evals/step_0.json").is_file())
        first.kill_everything()  # the sweep, its `rl` and all processes of the run: as a machine that goes down
    assert step_of(tmp_path, "slow-s0") < 2
    with sweeping(tmp_path) as second:
        second.wait_until(lambda: step_of(tmp_path, "fast-s0") >= 1, timeout_s=240)
        second.process.kill()  # the sweep alone: its `rl` goes on
        with sweeping(tmp_path) as third:
            third.wait_until(lambda: "fast-s0 runs already: taken over" in third.output() or "fast-s0 complete" in third.output())
            assert third.wait(240) == 0, third.output()
        assert "slow-s0 goes on" in second.output()
    check_pages(tmp_path / "sweep", third)


def check_pages(root: Path, last: Rl) -> None:
    status = {row["label"]: row for row in json.loads((root / "status.json").read_text())["runs"]}
    assert {label: (row["state"], row["step"], row["max_steps"]) for label, row in status.items()} == {
        "slow-s0": ("complete", 2, 2),
        "fast-s0": ("complete", 2, 2),
    }
    assert (status["slow-s0"]["attempts"], status["fast-s0"]["attempts"]) == (2, 1)
    comparison = json.loads((root / "comparison.json").read_text())
    means = {one["experiment"]: one["mean"] for one in comparison["experiments"]}
    for name in ("slow", "fast"):
        evaluated = json.loads((root / "runs" / f"{name}-s0" / "evals" / "step_2.json").read_text())
        assert means[name] == evaluated["metrics"][METRIC]
        assert status[f"{name}-s0"]["result"]["value"] == means[name]
        assert load_metrics(root / "runs" / f"{name}-s0")[2]["actor/lr"] == {"slow": 1e-4, "fast": 1e-2}[name]
    (answer,) = comparison["answers"]
    assert answer["difference"] == pytest.approx(means["fast"] - means["slow"])
    assert "| fast-s0 | a hundred times the learning rate | complete | 2/2 |" in last.output()
    assert (root / "pictures" / "critic_reward_mean.png").is_file()
    assert "data:image/png;base64," in (root / "comparison.html").read_text()
