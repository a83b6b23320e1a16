"""What a plan says of noise before anything starts."""

from typing import Any

import pytest

from turnwise.config import ConfigError, RLConfig
from turnwise.launch.arithmetic import Arithmetic
from turnwise.launch.describe import arithmetic_lines
from turnwise.launch.noise import noise_lines
from turnwise.launch.resolve import resolve

GSM8K = Arithmetic(examples=7473, batch_size=2048, group=8, max_steps=58)  # two epochs of 29 steps


def config(noise: dict[str, Any] | None, **tables: Any) -> RLConfig:
    return RLConfig.model_validate({"max_steps": 58, "inference": {"noise": noise}, **tables})


def test_a_run_without_noise_says_nothing_of_it():
    assert noise_lines(GSM8K, config(None)) == []


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        ({}, "sigma 0.01 to 0.0001 in 10 stages of 5.8 steps, the first without"),
        (
            {"sigma_start": 0.05, "sigma_end": 0.0005, "epoch_aware": True, "stages": 9},
            "sigma 0.05 to 0.0005 in 9 stages of 2.9 steps in each epoch, after 2.9 steps without",
        ),
    ],
)
def test_the_plan_says_how_long_the_stages_are(noise: dict[str, Any], words: str):
    (line,) = noise_lines(GSM8K, config(noise))
    assert words in line
    assert arithmetic_lines(GSM8K, config(noise))[-1] == line


def test_epochs_without_a_whole_step_are_refused_before_anything_starts():
    tables = {"env": [{"id": "wordle", "args": {"num_train": 8}}], "batch_size": 64, "rollouts_per_example": 4}
    with pytest.raises(ConfigError, match=r"inference.noise.epoch_aware = true .* use a smaller orchestrator.batch_size"):
        resolve(config({"epoch_aware": True}, orchestrator=tables))
