"""Every configuration that is shipped is valid, and does the steps that its comment promises."""

from pathlib import Path

import pytest

from turnwise.config.command import check, read_command
from turnwise.launch.arithmetic import count_tasks, training_arithmetic

CONFIGS = Path(__file__).parents[3] / "configs"
OVERLAY = CONFIGS / "cpu.toml"
FILES = sorted(path for path in CONFIGS.rglob("*.toml") if path != OVERLAY)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_configuration_is_valid(path: Path) -> None:
    config = check(read_command(["@", str(path)]))
    assert config.max_steps or config.epochs
    on_cpu = check(read_command(["@", str(path), "@", str(OVERLAY)]))
    assert (on_cpu.inference.engine, on_cpu.gpus.inference, on_cpu.gpus.trainer) == ("embedded", [], [])


def test_wordle_in_full_takes_70_epochs_of_30_steps() -> None:
    config = check(read_command(["@", str(CONFIGS / "wordle" / "rl_full.toml")]))
    arithmetic = training_arithmetic(config, count_tasks)
    assert (arithmetic.steps_per_epoch, arithmetic.max_steps) == (30, 2100)


def test_the_quickstart_is_the_one_that_was_measured() -> None:
    config = check(read_command(["@", str(CONFIGS / "quickstart.toml")]))
    assert (config.max_steps, config.orchestrator.batch_size, config.model.name) == (24, 32, "smollm2-135m")
    assert config.orchestrator.env[0].args["shortlist"] == 8
