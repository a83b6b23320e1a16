"""The canary alarm between a real trainer and real engines, right ones and ones with a planted fault behind a right digest."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from support.batches import make_batch
from support.faulty_engine import HiddenFault, faulty_engine
from support.served_engine import ENGINES, connected, dtype_of, started
from support.tiny_model import build_tiny_model
from turnwise.config import RLConfig
from turnwise.inference import InferenceClient
from turnwise.orchestrator.canary import CanaryAlarm, CanaryWatch
from turnwise.orchestrator.weights import Policy
from turnwise.trainer.loop import run_trainer
from turnwise.transport import BatchLog, RunDir, WeightsStore

STEPS = 8
LORA = {"rank": 6, "alpha": 9.0}


def config_of(model: Path, folder: Path, kind: str, dtype: str, lora: dict[str, Any] | None) -> RLConfig:
    trainer = {"threads": 1, "canaries": 4, "optim": {"lr": 1e-2}, "model": {"lora": lora}}
    tables = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "seq_len": 512,
        "model": {"name": str(model), "dtype": dtype},
        "inference": {"engine": kind, "embedded": {"threads": 1}},
        "trainer": trainer,
    }
    return RLConfig.model_validate(tables)


def train(config: RLConfig) -> WeightsStore:
    """Publish every version of a run on recorded batches."""
    run_dir = RunDir(config.output_dir)
    for step in range(1, STEPS + 1):
        BatchLog(run_dir.batches).write(make_batch(step, groups=4, group_size=4, prompt_tokens=40))
    run_trainer(config)
    return WeightsStore(run_dir.weights)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "model", hidden=128)


@pytest.fixture(scope="module")
def published(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RLConfig, WeightsStore]:
    """Adapters of a float32 run."""
    config = config_of(model, tmp_path_factory.mktemp("run") / "run", "embedded", "float32", LORA)
    return config, train(config)


async def follow(client: InferenceClient, store: WeightsStore) -> tuple[dict[str, float], int]:
    """Swap in version after version; metrics at the end, and the versions that were served."""
    policy = Policy(client, store, stop_ids=[257], max_loaded=3)
    async with asyncio.TaskGroup() as group:
        watch = CanaryWatch(policy, group)
        for version in range(STEPS + 1):
            ready = store.poll(version)
            assert ready is not None
            await policy.swap(ready)
            watch.ask(ready)
            if watch._asking is not None:  # pyright: ignore[reportPrivateUsage]
                await asyncio.wait([watch._asking])  # pyright: ignore[reportPrivateUsage]
    await policy.close()
    return watch.take(), policy.version


@pytest.mark.parametrize("kind", ENGINES)
async def test_a_right_engine_shows_every_step_of_the_trainer(kind: str, model: Path, tmp_path: Path) -> None:
    """Of several canaries at a time: vLLM once took the adapters of other rows for those of a prompt."""
    dtype = dtype_of(kind)
    (tmp_path / "engine").mkdir()
    store = await asyncio.to_thread(train, config_of(model, tmp_path / "run", kind, dtype, LORA))
    with started(kind, model, tmp_path / "engine", lora=LORA, dtype=dtype) as served:
        async with connected(served) as client:
            metrics, version = await follow(client, store)
    assert version == STEPS
    tolerance = 0.02 if kind == "vllm" else 1e-3
    assert metrics["canary/change_shown/mean"] == pytest.approx(1, abs=tolerance)
    assert metrics["canary/adapter_shown/mean"] == pytest.approx(1, abs=tolerance)
    assert metrics["canary/noise/mean"] < (0.05 if kind == "vllm" else 1e-4)


@pytest.mark.parametrize("kind", ENGINES)
async def test_an_engine_with_full_weights_shows_every_step(kind: str, model: Path, tmp_path: Path) -> None:
    dtype = dtype_of(kind)
    (tmp_path / "engine").mkdir()
    store = await asyncio.to_thread(train, config_of(model, tmp_path / "run", kind, dtype, None))
    with started(kind, model, tmp_path / "engine", lora=None, dtype=dtype) as served:
        async with connected(served) as client:
            metrics, version = await follow(client, store)
    assert version == STEPS
    assert metrics["canary/change_shown/mean"] == pytest.approx(1, abs=0.02 if kind == "vllm" else 1e-3)


@pytest.mark.parametrize("fault", ["version before", "not applied", "half of it"])
async def test_an_engine_that_holds_the_right_adapter_and_computes_with_another_is_found(
    published: tuple[RLConfig, WeightsStore], fault: HiddenFault
) -> None:
    config, store = published
    with pytest.RaisesGroup(pytest.RaisesExc(CanaryAlarm, match="holds the tensors that the trainer published")):
        async with (
            faulty_engine(config, store, fault) as urls,
            InferenceClient(urls, model=config.model.name, request_timeout_s=60, max_retries=0) as client,
        ):
            await follow(client, store)
    assert store.served() < STEPS
