"""The two commands as a user calls them: in a process of their own, from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GOOD = 'max_steps = 2\n[[orchestrator.env]]\nid = "wordle"\n'


def call(module: str, *args: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", f"turnwise.cli.{module}", *args],
        cwd=cwd,
        env=env,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_is_grouped_by_table_and_names_the_options(tmp_path: Path):
    done = call("rl", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for words in (
        "--dry-run",
        "--resume",
        "--clean",
        "[orchestrator.sampling]",
        "--trainer.model.lora.rank",
        "[[orchestrator.env]]",
    ):
        assert words in done.stdout


def test_without_arguments_it_says_what_to_type(tmp_path: Path):
    done = call("rl", cwd=tmp_path)
    assert done.returncode == 2
    assert "rl @ configs/quickstart.toml" in done.stderr


def test_a_wrong_configuration_ends_with_2_and_every_problem_and_no_traceback(tmp_path: Path):
    (tmp_path / "bad.toml").write_text("max_stesp = 2\n[orchestrator]\nbatch_size = 30\n")
    done = call("rl", "@", "bad.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "max_stesp = 2: there is no such key; did you mean max_steps?  [bad.toml]" in done.stderr
    assert "use 24 or 32" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_dry_run_starts_and_writes_nothing(tmp_path: Path, tiny_model: Path):
    (tmp_path / "good.toml").write_text(GOOD)
    done = call("rl", "@", "good.toml", "--model.name", str(tiny_model), "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "turnwise.orchestrator --config" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["good.toml"]


def test_resume_and_clean_contradict_each_other(tmp_path: Path):
    done = call("rl", "--resume", "--clean", cwd=tmp_path)
    assert done.returncode == 2
    assert "contradict" in done.stderr


@pytest.mark.parametrize("module", ["rl", "turnwise"])
def test_both_tell_their_version(module: str, tmp_path: Path):
    assert call(module, "--version", cwd=tmp_path).stdout.startswith("turnwise 0.")


def test_an_existing_run_is_not_touched(tmp_path: Path, tiny_model: Path):
    (tmp_path / "good.toml").write_text(GOOD)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "metrics.jsonl").write_text("precious\n")
    done = call("rl", "@", "good.toml", "--model.name", str(tiny_model), cwd=tmp_path)
    assert done.returncode == 2
    assert "--resume" in done.stderr
    assert (tmp_path / "outputs" / "metrics.jsonl").read_text() == "precious\n"


def test_resuming_nothing_is_refused(tmp_path: Path):
    (tmp_path / "good.toml").write_text(GOOD)
    done = call("rl", "@", "good.toml", "--resume", cwd=tmp_path)
    assert done.returncode == 2
    assert "holds no run" in done.stderr


def test_clean_keeps_the_old_run_when_the_new_one_cannot_start(tmp_path: Path):
    (tmp_path / "good.toml").write_text(GOOD)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "metrics.jsonl").write_text("precious\n")
    done = call("rl", "@", "good.toml", "--model.name", "./nowhere", "--clean", cwd=tmp_path)
    assert done.returncode == 2
    assert 'model.name = "./nowhere"' in done.stderr
    assert (tmp_path / "outputs" / "metrics.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, tiny_model: Path):
    (tmp_path / "good.toml").write_text(GOOD)
    (tmp_path / "file").touch()
    done = call("rl", "@", "good.toml", "--model.name", str(tiny_model), "--output-dir", "file/run", cwd=tmp_path)
    assert done.returncode == 1
    assert "Not a directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_environments_are_listed(tmp_path: Path):
    done = call("turnwise", "envs", cwd=tmp_path)
    assert done.returncode == 0
    assert "wordle" in done.stdout
    assert "gsm8k" in done.stdout


def test_an_environment_is_played_with_its_arguments(tmp_path: Path):
    done = call(
        "turnwise", "play", "wordle", "--answers", '["frost"]', "--seed", "1", cwd=tmp_path, stdin="<guess>frost</guess>\n"
    )
    assert done.returncode == 0, done.stderr
    assert "total reward" in done.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["play", "wordel"], "wordle"),
        (["play", "wordle", "--answrs", "3"], "answers"),
        (["play", "wordle", "stray"], "--name value"),
        (["play", "wordle", "--seed"], "expected one argument"),
        (["model", "smollm2-13m"], "did you mean smollm2-135m?"),
        (["report", "nowhere"], "holds no run"),
        (["eval", "--checkpoint", "nowhere"], "orchestrator.env is empty"),
        (["envs", "--nonsense"], "unrecognized arguments"),
    ],
)
def test_mistakes_end_with_2_and_a_sentence(args: list[str], words: str, tmp_path: Path):
    done = call("turnwise", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
