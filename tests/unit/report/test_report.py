"""report.md as a whole: of a finished run, of half-finished ones, and its pictures."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.planted_run import plant_run
from turnwise.report import plot_seeds, write_report
from turnwise.report.dialogue import dialogue, pick
from turnwise.report.plots import smoothed


def assert_picture(path: Path) -> None:
    """A PNG of a size that can be read, and not blank."""
    from matplotlib.image import imread

    pixels = imread(path)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 600
    assert pixels.std() > 0.02


def test_a_finished_run_is_reported_whole(tmp_path: Path) -> None:
    path = write_report(plant_run(tmp_path / "run"))
    text = path.read_text()
    assert path == tmp_path / "run" / "report.md"
    for expected in (
        "**Verdict: learning.** The held-out reward rose from 0 at step 0 to 1.4 at step 40",
        "Steps: 40 of 40",
        "the held-out reward rose from 0.000 to 1.400",
        "Best step: 40, held-out reward 1.400 (checkpoints/step_40)",
        "first held at step",
        "None of the checks found anything",
        "| val-aux/wordle/win | component | 0 | 0 |",
        "### Step 1, best",
        "### Step 21, typical",
        "### Step 40, best",
        "| held-out, step 0 | 36 |",
        "| model.name | `smollm2-135m` |",
        "--resume",
        "turnwise 0.",
    ):
        assert expected in text, expected
    assert text.count("Play Wordle.") == 1
    pictures = sorted((tmp_path / "run" / "report").glob("*.png"))
    assert [p.stem for p in pictures] == ["components", "env", "length", "reward", "timing", "training"]
    for picture in pictures:
        assert f"(report/{picture.name})" in text
        assert_picture(picture)
    rows = json.loads((tmp_path / "run" / "report" / "changes.json").read_text())
    assert [row["verdict"] for row in rows] == ["rose", "rose", "rose", *["unchanged"] * 4]


@pytest.mark.parametrize("missing", ["evals", "trajectories", "checkpoints", "config.toml", "metrics.jsonl"])
def test_a_run_that_lacks_a_part_is_reported_without_it(tmp_path: Path, missing: str) -> None:
    root = plant_run(tmp_path / "run", steps=3)
    path = root / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert write_report(root).read_text().startswith("# Report: ")


def test_an_empty_folder_is_a_run_that_has_not_begun(tmp_path: Path) -> None:
    assert "No optimiser step has been recorded yet" in write_report(tmp_path).read_text()


def test_a_run_of_one_step_with_one_evaluation_is_reported(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 0, "val-core/x/reward/mean": 0.1}\n{"step": 1, "critic/reward/mean": 0.2}\n'
    )
    text = write_report(tmp_path).read_text()
    assert "there is one, of step 0" in text
    assert "Best step: 0, held-out reward 0.100 (the untrained model)" in text


def test_without_evaluations_the_best_step_is_that_of_the_training_reward(tmp_path: Path) -> None:
    lines = [{"step": step, "critic/reward/mean": 1.0 - abs(step - 12) / 20} for step in range(1, 21)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Best step: 12, training reward" in write_report(tmp_path).read_text()


def test_a_condition_that_was_not_reached_is_said(tmp_path: Path) -> None:
    root = plant_run(tmp_path / "run", components={"win": lambda x: 0.1})
    assert "`running_mean(total_reward) > 0.5` was not reached" in write_report(root).read_text()


def test_seeds_are_drawn_together(tmp_path: Path) -> None:
    runs = [plant_run(tmp_path / str(seed), seed=seed, steps=8, eval_every=4) for seed in range(3)]
    names = ["critic/reward/mean", "val-core/wordle/reward/mean", "not/there"]
    assert_picture(plot_seeds(runs, names, tmp_path / "pictures" / "seeds.png", window=3))
    with pytest.raises(ValueError, match="not/there"):
        plot_seeds(runs, ["not/there"], tmp_path / "seeds.png")


def test_smoothing_keeps_a_line_and_does_not_shift_a_peak() -> None:
    assert smoothed([1.0, 2.0, 3.0, 4.0, 5.0], 3) == [1.5, 2.0, 3.0, 4.0, 4.5]
    assert smoothed([0.0, 0.0, 3.0, 0.0, 0.0], 3) == [0.0, 1.0, 1.0, 1.0, 0.0]
    assert smoothed([1.0, 5.0], 1) == [1.0, 5.0]


def test_a_message_with_fences_stays_inside_its_own() -> None:
    text = dialogue({"messages": [{"role": "assistant", "content": "```python\nx\n```"}], "reward": 1})
    assert "````text\n```python\nx\n```\n````" in text


def test_long_rollouts_and_messages_are_cut_in_the_middle() -> None:
    messages = [{"role": "user", "content": f"message {number} " + "x" * 5000} for number in range(40)]
    text = dialogue({"messages": messages, "reward": 0.0})
    assert "24 messages left out" in text
    assert "message 39" in text
    assert "message 20" not in text
    assert len(text) < 16 * 1400


def test_the_best_and_the_middle_rollout_are_picked_and_errors_only_alone() -> None:
    rollouts = [{"reward": value, "error": None} for value in (0.1, 0.9, 0.5)]
    assert pick([*rollouts, {"reward": 5.0, "error": "boom"}]) == [("typical", rollouts[2]), ("best", rollouts[1])]
    assert pick([{"reward": 0.0, "error": "boom"}]) == [("errored", {"reward": 0.0, "error": "boom"})]
    assert pick([]) == []


def test_importing_the_report_draws_nothing_and_loads_no_torch() -> None:
    code = "import sys, turnwise.report; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    environment = {**os.environ, "MPLBACKEND": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
