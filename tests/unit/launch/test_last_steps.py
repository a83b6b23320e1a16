"""Steps that were trained on after the orchestrator had ended."""

from pathlib import Path

import msgspec
import pytest

from support.batches import make_batch
from turnwise.config import RLConfig
from turnwise.launch.last_steps import record_last_steps
from turnwise.monitor import read_metrics
from turnwise.transport import BatchLog, RunDir, WeightsReady, WeightsStore


@pytest.fixture
def config(tmp_path: Path) -> RLConfig:
    return RLConfig.model_validate({"output_dir": str(tmp_path), "orchestrator": {"env": [{"id": "wordle"}]}})


def batch(config: RLConfig, step: int, **metrics: float) -> None:
    BatchLog(RunDir(config.output_dir).batches).write(msgspec.structs.replace(make_batch(step), metrics=metrics))


def version(config: RLConfig, number: int, **metrics: float) -> None:
    store = WeightsStore(RunDir(config.output_dir).weights)
    store.publish(WeightsReady(number, "lora", str(store.path(number)), "d", metrics), lambda folder: None)


def recorded(config: RLConfig) -> dict[int, set[str]]:
    lines = read_metrics(RunDir(config.output_dir).metrics)
    return {line["step"]: line.keys() - {"step", "time"} for line in lines}


def test_steps_beyond_the_recorded_ones_get_the_metrics_of_batch_and_training_once(config: RLConfig) -> None:
    RunDir(config.output_dir).metrics.write_text('{"step": 3, "critic/reward/mean": 0.5}\n{"step": 5, "val-core/x": 1.0}\n')
    for step in (3, 4, 5):
        batch(config, step, **{"critic/reward/mean": step / 10})
        version(config, step, **{"actor/lr": 1e-4})
    assert record_last_steps(config) == [4, 5]
    both = {"critic/reward/mean", "actor/lr"}
    assert {step: recorded(config)[step] for step in (4, 5)} == {4: both, 5: both}
    assert record_last_steps(config) == []


def test_a_batch_that_was_not_trained_on_and_a_version_that_no_step_made_are_no_steps(config: RLConfig) -> None:
    batch(config, 1, **{"critic/reward/mean": 0.1})
    version(config, 0)
    version(config, 2, **{"actor/lr": 1e-4})  # its batch was removed
    assert record_last_steps(config) == []
    assert recorded(config) == {}


def test_a_loss_that_was_not_a_number_is_recorded_as_such(config: RLConfig) -> None:
    batch(config, 1, **{"critic/reward/mean": 0.1})
    version(config, 1, **{"actor/lr": 1e-4, "actor/loss": float("nan")})
    assert record_last_steps(config) == [1]
    assert "monitor/nonfinite/count" in recorded(config)[1]
