"""The folder of a run: locked, never overwritten, cleaned by name, rewound to a checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from turnwise.config import ConfigError, RLConfig
from turnwise.config.command import read_command
from turnwise.config.files import dump_toml
from turnwise.launch.resume import latest_checkpoint, resumed_request, rewind, truncate_metrics
from turnwise.launch.run_folder import clean, holds_run, is_held, locked, refuse_existing
from turnwise.transport import Batch, BatchLog, Control, Progress, RunDir, Served, WeightsReady, WeightsStore


def saved_run(root: Path, **changes: object) -> RLConfig:
    config = RLConfig.model_validate(
        {
            "output_dir": root,
            "max_steps": 6,
            "model": {"name": "/models/x"},
            "orchestrator": {"env": [{"id": "wordle"}]},
            **changes,
        }
    )
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.toml").write_text(dump_toml(config))
    return config


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(tmp_path: Path):
    with locked(tmp_path):
        code = (
            f"from pathlib import Path\nfrom turnwise.launch.run_folder import locked\nwith locked(Path({str(tmp_path)!r})): pass"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode != 0
        assert "is in use by another run (process" in other.stderr
    with locked(tmp_path):
        pass


def test_who_asks_whether_a_folder_is_held_does_not_take_it(tmp_path: Path):
    assert not is_held(tmp_path / "none")
    with locked(tmp_path):
        assert is_held(tmp_path)
    assert not is_held(tmp_path)
    with locked(tmp_path):
        assert is_held(tmp_path)


def test_an_existing_run_is_refused_naming_both_ways_on(tmp_path: Path):
    refuse_existing(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"(?s)--resume.*--clean"):
        refuse_existing(tmp_path)


def test_cleaning_removes_what_a_run_writes_and_nothing_else(tmp_path: Path):
    for name in ("config.toml", "metrics.jsonl", "notes.txt", "step_9.jsonl"):
        (tmp_path / name).write_text("x")
    for name in ("checkpoints/step_1", "weights/v0", "my_data", "logs"):
        (tmp_path / name).mkdir(parents=True)
    elsewhere = tmp_path / "my_data" / "rollouts"
    elsewhere.mkdir()
    (elsewhere / "step_1.jsonl").touch()
    (elsewhere / "keep.jsonl").touch()
    removed = clean(tmp_path, elsewhere)
    assert {path.name for path in removed} == {"config.toml", "metrics.jsonl", "checkpoints", "weights", "logs", "step_1.jsonl"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my_data", "notes.txt", "step_9.jsonl"]
    assert [path.name for path in elsewhere.iterdir()] == ["keep.jsonl"]
    assert not holds_run(tmp_path)


def test_cleaning_does_not_follow_links(tmp_path: Path):
    target = tmp_path / "precious"
    target.mkdir()
    (target / "file").touch()
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(target)
    clean(run)
    assert (target / "file").exists()
    assert not (run / "checkpoints").is_symlink()


def test_metrics_are_cut_after_the_checkpoint_and_a_torn_line_goes(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "x": step}) for step in (0, 1, 2, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 2, "y"')
    truncate_metrics(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 2]


def test_rewinding_forgets_what_is_written_again_and_keeps_the_batches(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    trajectories = tmp_path / "trajectories"
    trajectories.mkdir()
    run_dir.evals.mkdir()
    batches, weights = BatchLog(run_dir.batches), WeightsStore(run_dir.weights)
    for step in (1, 2, 3):
        batches.write(Batch(step, [], [], 0, 1.0, Progress()))
    for step in (1, 2, 3, 4):
        (trajectories / f"step_{step}.jsonl").touch()
        (run_dir.evals / f"step_{step}.json").touch()
        weights.publish(WeightsReady(step, "lora", "", ""), lambda _: None)
    weights.acknowledge(Served(4))
    Control(tmp_path).request_stop("interrupted", "")
    run_dir.status.touch()
    rewind(tmp_path, trajectories, 2)
    assert batches.steps() == [1, 2, 3]
    assert sorted(path.name for path in trajectories.iterdir()) == ["step_1.jsonl", "step_2.jsonl", "step_3.jsonl"]
    assert sorted(path.name for path in run_dir.evals.iterdir()) == ["step_1.json", "step_2.json"]
    assert (weights.versions(), weights.served()) == ([1, 2], 2)
    assert Control(tmp_path).stop_request() is None
    assert not run_dir.status.exists()


def test_a_run_without_any_checkpoint_resumes_from_the_initial_weights(tmp_path: Path):
    assert latest_checkpoint(tmp_path) == 0


def test_only_damaged_checkpoints_are_refused_and_each_is_named(tmp_path: Path):
    said: list[str] = []
    for step in (2, 4):
        (tmp_path / "checkpoints" / f"step_{step}").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no checkpoint under .* is whole; start anew with --clean"):
        latest_checkpoint(tmp_path, said.append)
    assert ["step_4" in said[0], "step_2" in said[1]] == [True, True]


def resumed(tmp_path: Path, files: str, *flags: str):
    path = tmp_path / "mine.toml"
    path.write_text(files)
    return resumed_request(read_command(["@", str(path), *flags]), tmp_path / "run")


FILES = '[[orchestrator.env]]\nid = "wordle"\n'


def test_resuming_takes_the_saved_configuration_and_the_flags(tmp_path: Path):
    saved_run(tmp_path / "run", seq_len=512)
    request = resumed(tmp_path, f"max_steps = 6\n{FILES}", "--max-steps", "12")
    assert (request.tables["max_steps"], request.tables["seq_len"]) == ("12", 512)
    assert request.tables["model"]["name"] == "/models/x"


def test_what_changed_in_the_files_is_named_and_not_applied(tmp_path: Path):
    saved_run(tmp_path / "run")
    request = resumed(tmp_path, f"max_steps = 9\nseed = 0\n{FILES}[trainer.optim]\nlr = 0.5\n")
    assert request.tables["max_steps"] == 6
    assert request.notices == (
        "This run keeps max_steps, trainer.optim.lr as it began, which the files say otherwise; give a flag to change one.",
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--seed", "3"],
        ["--model.name", "other"],
        ["--trainer.model.lora.rank", "3"],
        ["--epochs", "2"],
        ["--no-trainer.model.lora"],
    ],
)
def test_what_a_run_keeps_for_life_cannot_be_changed(tmp_path: Path, flags: list[str]):
    saved_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"at --resume"):
        resumed(tmp_path, f"max_steps = 6\n{FILES}", *flags)


def test_a_saved_configuration_that_no_longer_fits_is_told_with_its_file(tmp_path: Path):
    saved_run(tmp_path / "run")
    with (tmp_path / "run" / "config.toml").open("a") as file:
        file.write("\n[removed_since]\nx = 1\n")
    with pytest.raises(ConfigError, match=r"(?s)removed_since: there is no such key.*run/config\.toml\]"):
        resumed(tmp_path, f"max_steps = 6\n{FILES}")


def test_a_fixed_key_may_be_repeated(tmp_path: Path):
    saved_run(tmp_path / "run")
    assert resumed(tmp_path, f"max_steps = 6\n{FILES}", "--seed", "0").tables["seed"] == "0"


def test_resuming_where_no_run_is_says_so(tmp_path: Path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"holds no run: it has no config\.toml"):
        resumed(tmp_path, FILES)
