"""Whole runs through `rl` with noise in the norms of the policy that samples."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from support.noisy_engine import NoisyEngine
from support.orchestrated import make_config, run, trainer_of
from support.orchestrated import metrics as orchestrated_metrics
from support.rl_command import finish, running, write_config
from support.run_records import batches, metrics
from turnwise.config import NoiseConfig
from turnwise.transport import RunDir

STEPS = 4
NOISE = """
[inference.noise]
sigma_start = 0.2
sigma_end = 0.002
stages = 4
"""
SIGMAS = [0.0, 0.2, 0.02, 0.002]  # of versions 0 to 3, which sampled batches 1 to 4


def config_with_noise(folder: Path, model: Path, *, max_staleness: int = 0) -> Path:
    path = write_config(folder, model, max_steps=STEPS, max_staleness=max_staleness)
    path.write_text(path.read_text() + NOISE)
    return path


def evaluation(root: Path, step: int) -> dict[str, Any]:
    return json.loads((RunDir(root).evals / f"step_{step}.json").read_text())


def adapter(root: Path, step: int) -> dict[str, bytes]:
    tensors = load_file(RunDir(root).checkpoint(step) / "adapter" / "adapter_model.safetensors")
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


EVERY_STEP = ("--ckpt.interval", "1", "--orchestrator.eval.interval", "1")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Run folder of four strictly alternating steps, one a stage, each evaluated."""
    folder = tmp_path_factory.mktemp("noisy")
    path = config_with_noise(folder, tiny_model)
    output = finish(folder, "@", str(path), *EVERY_STEP)
    assert "Done at step 4 of 4" in output
    assert "sigma 0.2 to 0.002 in 4 stages of 1 steps, the first without" in output
    return folder / "run"


def test_each_step_is_sampled_with_the_noise_of_its_stage(noisy: Path):
    found = metrics(noisy)
    for step, sigma in enumerate(SIGMAS, start=1):
        assert found[step]["noise/stage"] == step - 1
        assert found[step]["noise/sigma"] == pytest.approx(sigma)
        assert found[step]["noise/effective_sigma/mean"] == pytest.approx(sigma, rel=0.2)
        assert found[step]["noise/changed/share"] == pytest.approx(float(sigma > 0), abs=0.01)


def test_the_mismatch_measures_the_noise(noisy: Path):
    """Engine and trainer agree where there is none; the trainer's policy has none in any step."""
    kl = [metrics(noisy)[step]["mismatch/kl/mean"] for step in range(1, STEPS + 1)]
    assert kl[0] < 1e-6
    assert kl[1] > 100 * max(kl[0], 1e-6)
    assert kl[1] > kl[2] > kl[3]


def test_noise_is_not_corrected_unless_the_configuration_says_so(noisy: Path):
    """Ratios are against the trainer's own policy: none of the first update is clipped."""
    assert all(metrics(noisy)[step]["actor/clip_fraction"] == 0 for step in range(1, STEPS + 1))


def test_an_evaluation_plays_what_an_engine_without_noise_plays(noisy: Path, tmp_path: Path):
    """Word by word: replies are a function of the policy and the seed alone. Version 1 had the most noise."""
    result = tmp_path / "result.json"
    folder = noisy / "checkpoints" / "step_1"
    command = ["eval", "@", str(noisy.parent / "run.toml"), "--checkpoint", str(folder), "--json", str(result)]
    done = subprocess.run(
        [sys.executable, "-m", "turnwise.cli.turnwise", *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    then, now = evaluation(noisy, 1), json.loads(result.read_text())
    assert [r["messages"] for r in then["rollouts"]] == [r["messages"] for r in now["rollouts"]]
    assert then["metrics"] == now["metrics"]


def test_a_resumed_run_repeats_the_noise_to_the_bit(noisy: Path, tmp_path: Path, tiny_model: Path):
    """Killed after the checkpoint of step 2, whose version had noise: rollouts with their logprobs, and the adapter."""
    path = config_with_noise(tmp_path, tiny_model)
    with running(tmp_path, "@", str(path), *EVERY_STEP) as rl:
        rl.wait_until(lambda: (RunDir(tmp_path / "run").checkpoint(2) / "meta.json").exists())
        rl.kill_everything()
    output = finish(tmp_path, "@", str(path), *EVERY_STEP, "--resume")
    assert "Resuming after step 2" in output
    assert_same(noisy, tmp_path / "run", [1, 2, 3, 4])


def assert_same(one: Path, other: Path, steps: Sequence[int]) -> None:
    for a, b in zip(batches(one), batches(other), strict=True):
        assert a.samples == b.samples
    for step in steps:
        assert adapter(one, step) == adapter(other, step)
        assert evaluation(one, step)["rollouts"] == evaluation(other, step)["rollouts"]


def test_full_weights_and_rollouts_in_flight_go_through_noise_and_evaluations(tmp_path: Path, tiny_model: Path):
    """Samples may be a version old: swaps and evaluations cut requests, which go on."""
    path = config_with_noise(tmp_path, tiny_model, max_staleness=1)
    finish(tmp_path, "@", str(path), "--no-trainer.model.lora", "--trainer.optim.lr", "1e-4", "--orchestrator.eval.interval", "1")
    found = metrics(tmp_path / "run")
    for step in range(1, STEPS + 1):
        served = SIGMAS[max(0, step - 2) : step]  # by the version before the step, or the one before that
        assert any(found[step]["noise/sigma"] == pytest.approx(sigma) for sigma in served)
    assert sorted(path.name for path in RunDir(tmp_path / "run").evals.iterdir()) == [f"step_{n}.json" for n in range(STEPS + 1)]


async def test_no_training_token_is_sampled_without_noise_and_no_evaluated_one_with_it(tiny_model: Path, tmp_path: Path):
    """Every answer of an engine, with the sigma that its norms held then, in a run with rollouts in flight all the time."""
    noise = NoiseConfig(sigma_start=0.2, sigma_end=0.002, stages=4)
    config = make_config(tiny_model, tmp_path, orchestrator={"eval": {"num_examples": 4, "interval": 1, "temperature": 0.25}})
    config = config.model_copy(update={"inference": config.inference.model_copy(update={"noise": noise})})
    async with NoisyEngine(latency_s=0.1) as engine:  # a turn takes longer than a step: requests are in flight at every swap
        assert await run(config, engine, trainer_of(config, step_s=0.05)) is None
    evaluated = {sigma for temperature, _, sigma in engine.answered if temperature == 0.25}
    trained = {(name, round(sigma, 6)) for temperature, name, sigma in engine.answered if temperature == 1.0}
    assert evaluated == {0}
    noises = [sigma for sigma, _ in engine.applied if sigma]
    assert {round(sigma, 6) for sigma in noises} == {0.2, 0.02, 0.002}
    # an adapter is sampled with the noise of its version, or, where a request outlives it, with that of the next
    for name, sigma in trained:
        version = int(name.removeprefix("v"))
        assert sigma in {round(value, 6) for value in [*SIGMAS, SIGMAS[-1]][version : version + 2]}
    merged = orchestrated_metrics(config)
    assert not any(name.startswith("canary/") for values in merged.values() for name in values)
    assert merged[2]["perf/held_by_evaluation/share"] > 0
