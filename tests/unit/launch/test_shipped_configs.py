"""Every configuration that is shipped is valid, and does the steps that its comment promises."""

from pathlib import Path

import pytest

from turnwise.config.command import check, read_command
from turnwise.launch.allocation import allocate
from turnwise.launch.arithmetic import count_tasks, training_arithmetic
from turnwise.launch.gpus import Gpu, Machine, TorchBuild
from turnwise.launch.shape import ModelShape

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


@pytest.mark.parametrize(("name", "shared"), [("one_gpu", [0]), ("two_gpus", [])])
def test_wordle_on_gpus_fits_a_gpu_of_24_gib(name: str, shared: list[int]) -> None:
    config = check(read_command(["@", str(CONFIGS / "wordle" / f"{name}.toml")]))
    assert (config.inference.engine, config.gpus.shared, config.model.name) == ("vllm", shared, "smollm2-135m")
    gpus = tuple(Gpu(str(index), f"GPU-{index}", "a GPU", 24 * 2**30, 0) for index in range(2))
    shape = ModelShape(30, 576, 1536, 9, 3, 64, 49152, tied=True, dtype="bfloat16")
    allocation = allocate(config, Machine(gpus[: 1 if shared else 2], None, TorchBuild("2.11.0", "13.0")), shape)
    assert (allocation.errors, allocation.warnings, len(allocation.splits)) == ((), (), len(shared))


def test_the_quickstart_is_the_one_that_was_measured() -> None:
    config = check(read_command(["@", str(CONFIGS / "quickstart.toml")]))
    assert (config.max_steps, config.orchestrator.batch_size, config.model.name) == (24, 32, "smollm2-135m")
    assert config.orchestrator.env[0].args["shortlist"] == 8
