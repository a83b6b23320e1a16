"""Whole runs through `rl`: what they leave, that they repeat, that they resume exactly, that nothing is counted twice."""

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from support.rl_command import finish, running, write_config
from support.run_records import batches, metrics
from turnwise.config import load_config
from turnwise.transport import BatchLog, RunDir


def adapter(root: Path, step: int) -> dict[str, bytes]:
    tensors = load_file(RunDir(root).checkpoint(step) / "adapter" / "adapter_model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Run folder of four strictly alternating steps."""
    folder = tmp_path_factory.mktemp("four")
    output = finish(folder, "@", str(write_config(folder, tiny_model, max_steps=4, max_staleness=0)))
    assert "Done at step 4 of 4" in output
    assert "steps an epoch = floor(8 x 2 / 4) = 4; 4 steps = 1 epochs" in output
    return folder / "run"


def test_a_run_leaves_everything_that_was_promised(four_steps: Path):
    assert {path.name for path in four_steps.iterdir()} >= {
        *("config.toml", "metrics.jsonl", "report.md", "logs", "trajectories", "evals", "checkpoints", "weights", "batches"),
    }
    assert {path.name for path in (four_steps / "logs").glob("*.stdout")} >= {
        *("inference.stdout", "orchestrator.stdout", "trainer.stdout"),
    }
    assert list((four_steps / "logs" / "torchrun").rglob("*.log"))
    assert [path.name for path in sorted((four_steps / "evals").iterdir())] == ["step_0.json", "step_4.json"]
    assert len(list((four_steps / "trajectories").iterdir())) == 4
    config = load_config(four_steps / "config.toml")
    assert (config.max_steps, config.output_dir) == (4, four_steps)


def test_every_step_has_its_metrics(four_steps: Path):
    found = metrics(four_steps)
    assert sorted(found) == [0, 1, 2, 3, 4]
    for step in (1, 2, 3, 4):
        for name in ("critic/reward/mean", "actor/loss", "actor/grad_norm", "actor/entropy", "mismatch/logprob_abs/mean"):
            assert name in found[step]
        assert found[step]["staleness/max"] == 0
    assert {step for step, values in found.items() if "val-core/wordle/reward/mean" in values} == {0, 4}


def test_engine_and_trainer_agree_on_logprobs(four_steps: Path):
    assert all(metrics(four_steps)[step]["mismatch/logprob_abs/max"] < 1e-3 for step in (1, 2, 3, 4))


def test_the_engine_shows_every_change_of_the_trainer(four_steps: Path):
    found = list(metrics(four_steps).values())
    shown = [
        values[name] for name in ("canary/change_shown/min", "canary/adapter_shown/min") for values in found if name in values
    ]
    assert len(shown) >= 2
    assert shown == pytest.approx([1.0] * len(shown), abs=1e-2)
    assert all(values["canary/noise/mean"] < 1e-3 for values in found if "canary/noise/mean" in values)


def test_the_policy_that_sampled_each_batch_is_the_one_before_its_step(four_steps: Path):
    for batch in batches(four_steps):
        assert {version for sample in batch.samples for version in sample.policy_versions} <= {-1, batch.step - 1}


def assert_same_run(one: Path, other: Path, steps: Sequence[int]) -> None:
    """To the bit: rollouts with their logprobs, and the adapter that they made."""
    for a, b in zip(batches(one), batches(other), strict=True):
        assert a.samples == b.samples
        assert a.rollout_ids == b.rollout_ids
    for step in steps:
        assert adapter(one, step) == adapter(other, step)


def test_two_steps_and_a_resume_equal_four_steps_to_the_bit(four_steps: Path, tmp_path: Path, tiny_model: Path):
    config = write_config(tmp_path, tiny_model, max_steps=2, max_staleness=0)
    finish(tmp_path, "@", str(config))
    output = finish(tmp_path, "@", str(config), "--resume", "--max-steps", "4")
    assert "Resuming after step 2" in output
    assert_same_run(four_steps, tmp_path / "run", [4])


def test_a_run_can_be_repeated_from_its_saved_configuration(four_steps: Path, tmp_path: Path):
    saved = four_steps / "config.toml"
    output = tmp_path / "again"
    finish(
        tmp_path,
        "@",
        str(saved),
        "--output-dir",
        str(output),
        "--trajectories-dir",
        str(output / "trajectories"),
        "--inference.port",
        "None",
    )
    assert_same_run(four_steps, output, [4])


def test_a_complete_run_has_nothing_to_resume(four_steps: Path):
    before = (four_steps / "metrics.jsonl").read_bytes()
    output = finish(four_steps.parent, "@", str(four_steps.parent / "run.toml"), "--resume")
    assert "This run is complete: step 4 of 4" in output
    assert (four_steps / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_is_evaluated_by_itself_as_it_was_in_the_run(four_steps: Path, tmp_path: Path):
    result = tmp_path / "result.json"
    command = ["eval", "@", str(four_steps.parent / "run.toml"), "--checkpoint", str(four_steps / "checkpoints" / "step_4")]
    done = subprocess.run(
        [sys.executable, "-m", "turnwise.cli.turnwise", *command, "--json", str(result)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "val-core/wordle/reward/mean" in done.stdout
    then = json.loads((four_steps / "evals" / "step_4.json").read_text())
    now = json.loads(result.read_text())
    assert now["step"] == 4
    assert now["metrics"]["val-core/wordle/reward/mean"] == pytest.approx(then["metrics"]["val-core/wordle/reward/mean"])


def test_a_report_can_be_written_again(four_steps: Path):
    (four_steps / "report.md").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "turnwise.cli.turnwise", "report", str(four_steps)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(four_steps / "report.md"))


def test_a_damaged_checkpoint_is_passed_over_with_a_word(four_steps: Path, tmp_path: Path, tiny_model: Path):
    config = write_config(tmp_path, tiny_model, max_steps=2, max_staleness=0)
    finish(tmp_path, "@", str(config), "--ckpt.interval", "1")
    weights = RunDir(tmp_path / "run").checkpoint(2) / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    output = finish(tmp_path, "@", str(config), "--resume", "--max-steps", "4")
    assert "step_2" in output
    assert "Trying the one before it." in output
    assert "Resuming after step 1" in output
    assert_same_run(four_steps, tmp_path / "run", [4])


def test_kill_9_at_random_moments_loses_and_repeats_nothing(tmp_path: Path, tiny_model: Path):
    """Exactly-once accounting from the batch log, whatever was killed and whenever."""
    config, root = write_config(tmp_path, tiny_model, max_steps=12), tmp_path / "run"
    moments = random.Random(5)
    args: list[str] = ["--ckpt.interval", "2"]
    for wanted in (3, 6):
        with running(tmp_path, "@", str(config), *args) as rl:
            rl.wait_until(lambda wanted=wanted: BatchLog(RunDir(root).batches).path(wanted).exists())
            victims = [process for process in rl.processes() if process.pid != rl.process.pid]
            moments.choice(victims).kill()
            rl.kill_everything()
        args = ["--resume"]
    finish(tmp_path, "@", str(config), "--resume")
    log = batches(root)
    assert [batch.step for batch in log] == list(range(1, 13))
    accounted = [rollout for batch in log for rollout in batch.rollout_ids]
    assert len(accounted) == len(set(accounted))
    trained = [{sample.rollout_id for sample in batch.samples} for batch in log]
    assert [len(rollouts) for rollouts in trained] == [4] * 12
    assert len(set[str]().union(*trained)) == 12 * 4
    progress = log[-1].progress
    groups = {int(rollout[1:].split("-")[0]) for rollout in accounted}
    assert groups | set(progress.pending) == set(range(progress.next_group))
    assert not groups & set(progress.pending)
    assert sorted(step for step in metrics(root) if step) == list(range(1, 13))
    assert all("actor/loss" in metrics(root)[step] for step in range(1, 13))
