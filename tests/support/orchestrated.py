"""A whole orchestrator beside an engine without a model and a trainer without one, and what it leaves behind."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import run_records
from support.fake_trainer import FakeTrainer
from support.rollouts import ECHO
from support.scripted_engine import ScriptedEngine
from turnwise.config import RLConfig
from turnwise.containers import Pools
from turnwise.inference.client import InferenceClient
from turnwise.orchestrator.__main__ import load_progress
from turnwise.orchestrator.loop import Orchestrator
from turnwise.transport import Batch, RunDir, Sample, StopRequest

DEADLINE_S = 60.0


def make_config(model: Path, out: Path, *, max_steps: int = 4, port: int | None = None, **changes: Any) -> RLConfig:
    orchestrator = {
        "batch_size": 8,
        "rollouts_per_example": 4,
        "env": [{"id": ECHO}],
        "sampling": {"max_tokens": 8},
        "eval": {"num_examples": 2, "at_start": False},
        **changes.pop("orchestrator", {}),
    }
    tables = {
        "output_dir": str(out),
        "model": {"name": str(model)},
        "max_steps": max_steps,
        "orchestrator": orchestrator,
        "monitor": {"tensorboard": False},
        "inference": {"port": port, "dp": 1, "request_timeout_s": 20, "max_retries": 0},
    }
    return RLConfig.model_validate({**tables, **changes})


async def run(
    config: RLConfig,
    engine: ScriptedEngine,
    trainer: FakeTrainer | None,
    *,
    resume_step: int = 0,
    cut_after_s: float | None = None,
    containers: Pools | None = None,
) -> StopRequest | None:
    """Run the orchestrator beside a trainer; `cut_after_s` breaks it off there, like a kill."""
    progress, next_batch = load_progress(RunDir(config.output_dir), resume_step)
    training = asyncio.create_task(trainer.run()) if trainer is not None else None
    client = InferenceClient([engine.url], model="base", request_timeout_s=20, max_retries=0)
    try:
        async with client, asyncio.timeout(cut_after_s or DEADLINE_S):
            made = Orchestrator(
                config, client, resume_step=resume_step, progress=progress, next_batch=next_batch, containers=containers
            )
            return await made.run()
    finally:
        if training is not None:
            training.cancel()
            await asyncio.wait([training])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def batches(config: RLConfig) -> list[Batch]:
    return run_records.batches(config.output_dir)


def samples(config: RLConfig) -> list[list[Sample]]:
    return [batch.samples for batch in batches(config)]


def metrics(config: RLConfig) -> dict[int, dict[str, float]]:
    return run_records.metrics(config.output_dir)


def trainer_of(config: RLConfig, **settings: Any) -> FakeTrainer:
    assert config.max_steps is not None
    return FakeTrainer(RunDir(config.output_dir), config.max_steps, **settings)
