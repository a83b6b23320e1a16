"""Reading run folders, whole and damaged."""

import json
import logging
from pathlib import Path

import pytest

from support.planted_run import plant_run
from turnwise.report import Run, load_metrics
from turnwise.report.run import Variety, replies


def test_lines_of_one_step_are_merged_and_null_is_no_value(tmp_path: Path) -> None:
    lines = [
        {"step": 2, "time": 1.0, "actor/loss": 1},
        {"step": 1, "actor/loss": None, "actor/lr": 0.5},
        {"step": 2, "val-core/x/reward/mean": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_metrics(tmp_path) == {1: {"actor/lr": 0.5}, 2: {"actor/loss": 1.0, "val-core/x/reward/mean": 3.0}}
    assert list(load_metrics(tmp_path)) == [1, 2]


def test_a_run_knows_its_steps_components_and_checkpoints(tmp_path: Path) -> None:
    run = Run.load(plant_run(tmp_path / "run", steps=4, eval_every=2))
    assert run.train_steps == [1, 2, 3, 4]
    assert run.eval_steps == [0, 2, 4]
    assert run.components() == {"format", "feedback", "win"}
    assert run.trajectory_steps() == [1, 2, 3, 4]
    assert run.checkpoints() == [4]
    assert run.name == "planted"


def test_an_evaluation_that_is_not_in_the_metrics_yet_counts(tmp_path: Path) -> None:
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "step_7.json").write_text(json.dumps({"step": 7, "metrics": {"val-core/x/reward/mean": 0.5}}))
    assert Run.load(tmp_path).metrics == {7: {"val-core/x/reward/mean": 0.5}}


def test_broken_files_cost_only_themselves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = plant_run(tmp_path / "run", steps=4, eval_every=2)
    (root / "evals" / "step_2.json").write_text('{"step": 2, "metr')
    (root / "config.toml").write_text("run_name = [")
    with (root / "trajectories" / "step_1.jsonl").open("a") as file:
        file.write('{"rollout_id": "r9", "mess\n[]\n')
    with caplog.at_level(logging.WARNING):
        run = Run.load(root)
        assert len(run.rollouts(1)) == 8
    assert sorted(run.evals) == [0, 4]
    assert run.name == "run"
    for name in ("step_2.json", "config.toml", "step_1.jsonl, line 9"):
        assert name in caplog.text


def test_the_wait_for_the_engines_to_start_is_no_time_of_a_step(tmp_path: Path) -> None:
    lines = [{"step": step, "timing/step_s": 2.0 + (130 if step == 3 else 0), "timing/wait_batch_s": 130.5} for step in (3, 4, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert Run.load(tmp_path).step_seconds() == ([3, 4, 5], [1.5, 2.0, 2.0])
    (tmp_path / "metrics.jsonl").write_text("")
    assert Run.load(tmp_path).step_seconds() == ([], [])


def test_a_moved_run_folder_still_finds_its_trajectories(tmp_path: Path) -> None:
    root = plant_run(tmp_path / "run", steps=2)
    (root / "config.toml").write_text('trajectories_dir = "/not/here"\n' + (root / "config.toml").read_text())
    assert Run.load(root).trajectory_steps() == [1, 2]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a run folder"):
        Run.load(tmp_path / "nowhere")


def test_variety_counts_what_the_assistant_said() -> None:
    rollouts = [
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": f" {word}\n"}]}
        for word in ("a", "b", "a", "a")
    ]
    assert replies(rollouts) == ["a", "b", "a", "a"]
    assert Variety.of(replies(rollouts)) == Variety(replies=4, distinct=2, most_common="a", most_common_share=0.75)
    assert Variety.of([]) is None
    assert replies([{"messages": None}, {}]) == []
