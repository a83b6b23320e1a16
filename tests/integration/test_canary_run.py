"""The canary alarm in a whole orchestrator: what a right engine leaves in the metrics, and how a wrong one ends the run."""

from pathlib import Path

import pytest

from support.canaries import Fault, MovingPolicy
from support.orchestrated import make_config, metrics, run, trainer_of
from support.scripted_engine import ScriptedEngine
from turnwise.orchestrator.canary import CanaryAlarm
from turnwise.transport import RunDir, WeightsStore


async def test_canaries_of_a_right_engine_are_in_the_metrics(tiny_model: Path, tmp_path: Path) -> None:
    moving = MovingPolicy()
    config = make_config(tiny_model, tmp_path, max_steps=6)
    async with ScriptedEngine(prompt_logprobs=moving.engine()) as engine:
        assert await run(config, engine, trainer_of(config, canaries=moving.canaries, step_s=0.1)) is None
    found = metrics(config)
    assert "canary/noise/mean" not in found[1]  # of the version before, which had none
    for step in (3, 4, 5, 6):
        assert found[step]["canary/change_shown/mean"] > 0.7
        assert found[step]["canary/adapter_shown/mean"] > 0.7
        assert found[step]["canary/noise/mean"] < 0.1


@pytest.mark.parametrize("fault", ["version before", "no adapter", "half of the adapter"])
async def test_an_engine_with_the_right_digest_and_the_wrong_logprobs_ends_the_run(
    tiny_model: Path, tmp_path: Path, fault: Fault
) -> None:
    moving = MovingPolicy()
    config = make_config(tiny_model, tmp_path, max_steps=40)
    async with ScriptedEngine(prompt_logprobs=moving.engine(fault, first=8)) as engine:
        with pytest.RaisesGroup(pytest.RaisesExc(CanaryAlarm, match="does not compute with them")):
            await run(config, engine, trainer_of(config, canaries=moving.canaries, step_s=0.05))
    assert 8 <= WeightsStore(RunDir(tmp_path).weights).served() < 20
