"""The canary alarm against engines that speak the real routes: what is asked, when, and what is made of the answers."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from support.canaries import Fault, MovingPolicy
from support.fake_trainer import publish
from support.scripted_engine import Fault as Failure
from support.scripted_engine import ScriptedEngine
from turnwise.inference.client import InferenceClient
from turnwise.orchestrator.canary import CanaryAlarm, CanaryWatch
from turnwise.orchestrator.weights import Policy
from turnwise.transport import Canary, WeightsReady, WeightsStore


class Run:
    """Swaps one version after the other into engines, and waits for their canaries each time."""

    def __init__(self, policy: Policy, watch: CanaryWatch, moving: MovingPolicy) -> None:
        self.policy, self.watch, self.moving = policy, watch, moving
        self.version = -1

    async def swap(self) -> WeightsReady:
        self.version += 1
        publish(self.policy.store, self.version, canaries=self.moving.canaries(self.version))
        ready = self.policy.store.poll(self.version)
        assert ready is not None
        await self.policy.swap(ready)
        self.watch.ask(ready)
        return ready

    async def versions(self, count: int) -> None:
        for _ in range(count):
            await self.swap()
            await self.answered()

    async def answered(self) -> None:
        task = self.watch._asking  # pyright: ignore[reportPrivateUsage]
        if task is not None:
            await asyncio.wait([task])


@asynccontextmanager
async def running(tmp_path: Path, moving: MovingPolicy, *engines: ScriptedEngine) -> AsyncIterator[Run]:
    async with AsyncExitStack() as stack:
        for engine in engines:
            await stack.enter_async_context(engine)
        urls = [engine.url for engine in engines]
        client = await stack.enter_async_context(InferenceClient(urls, model="base", request_timeout_s=5, max_retries=0))
        policy = Policy(client, WeightsStore(tmp_path / "weights"), stop_ids=[257])
        group = await stack.enter_async_context(asyncio.TaskGroup())
        yield Run(policy, CanaryWatch(policy, group), moving)
        await policy.close()


async def found_after(tmp_path: Path, moving: MovingPolicy, *engines: ScriptedEngine, most: int) -> tuple[int, str]:
    """Versions until the alarm, and its words."""
    run: Run | None = None
    with pytest.RaisesGroup(CanaryAlarm) as caught:
        async with running(tmp_path, moving, *engines) as run:
            await run.versions(most + 1)
    assert run is not None
    return run.version, str(caught.value.exceptions[0])


async def test_fifty_versions_of_a_right_engine_with_bfloat16_noise_raise_no_alarm(tmp_path: Path):
    moving = MovingPolicy()
    async with running(tmp_path, moving, ScriptedEngine(prompt_logprobs=moving.engine())) as run:
        await run.versions(51)
        metrics = run.watch.take()
        assert run.watch.take() == {}
    assert metrics["canary/change_shown/mean"] == metrics["canary/change_shown/min"] > 0.7  # noise of half a step: 5/6 on average
    assert metrics["canary/adapter_shown/mean"] > 0.97
    assert 0 < metrics["canary/change_shown/error"] < 0.05
    assert metrics["canary/noise/mean"] == pytest.approx(0.05, rel=0.3)


async def test_without_noise_the_whole_change_is_shown_and_a_step_that_changes_nothing_has_no_share(tmp_path: Path):
    moving = MovingPolicy(noise=1e-6)
    async with running(tmp_path, moving, ScriptedEngine(prompt_logprobs=moving.engine())) as run:
        await run.versions(3)
        assert run.watch.take()["canary/change_shown/mean"] == pytest.approx(1, abs=1e-3)
    still = MovingPolicy(change=0.0, noise=0.0)
    async with running(tmp_path / "still", still, ScriptedEngine(prompt_logprobs=still.engine())) as run:
        await run.versions(3)
        assert run.watch.take() == {"canary/noise/mean": 0.0}


@pytest.mark.parametrize("fault", ["version before", "no adapter", "half of the adapter"])
@pytest.mark.parametrize("first", [0, 12])
async def test_an_engine_that_serves_something_else_under_the_name_is_found_within_versions(
    tmp_path: Path, fault: Fault, first: int
):
    """Its digest is right. Half of an adapter is told from noise once the adapter is larger than a step."""
    moving = MovingPolicy()
    engine = ScriptedEngine(prompt_logprobs=moving.engine(fault, first=first))
    version, words = await found_after(tmp_path, moving, engine, most=first + 14)
    assert version - first <= (14 if fault == "half of the adapter" and first == 0 else 6)
    assert f"version {version}: engine 0 ({engine.url}) holds the tensors that the trainer published" in words
    assert "standard error" in words
    assert f"of the {'step from version' if 'the step' in words else 'adapter'}" in words


async def test_every_engine_is_asked_by_itself_and_the_wrong_one_is_named(tmp_path: Path):
    moving = MovingPolicy()
    engines = [ScriptedEngine(prompt_logprobs=moving.engine(fault)) for fault in ("none", "version before", "none")]
    version, words = await found_after(tmp_path, moving, *engines, most=8)
    assert f"engine 1 ({engines[1].url})" in words
    assert [len(engine.requests) for engine in engines] == [2 * version] * 3


async def test_an_engine_is_asked_for_the_logprobs_of_the_version_and_one_greedy_token(tmp_path: Path):
    moving = MovingPolicy(count=1, tokens=8)
    engine = ScriptedEngine(prompt_logprobs=moving.engine())
    async with running(tmp_path, moving, engine) as run:
        await run.versions(2)
    (body,) = engine.requests
    assert (body["model"], body["max_tokens"], body["temperature"], body["prompt_logprobs"]) == ("v1", 1, 0.0, 0)
    assert tuple(body["prompt"]) in moving.exact


async def test_a_swap_does_not_wait_for_canaries_and_their_adapter_stays_until_they_are_answered(tmp_path: Path):
    moving = MovingPolicy()
    engine = ScriptedEngine(prompt_logprobs=moving.engine(), latency_s=0.3)
    async with running(tmp_path, moving, engine) as run:
        await run.swap()
        await run.swap()
        await engine.busy.wait()
        await run.swap()
        assert run.policy.version == 2
        assert engine.running == 2  # still those of version 1; those of version 2 are passed over
        assert sorted(engine.adapters) == ["v1", "v2"]
        await run.answered()
        await asyncio.sleep(0.05)
        assert list(engine.adapters) == ["v2"]
        assert {body["model"] for body in engine.requests} == {"v1"}
        assert "canary/noise/mean" in run.watch.take()


async def test_an_engine_that_does_not_answer_is_told_of_and_proves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    moving = MovingPolicy()
    engine = ScriptedEngine(prompt_logprobs=moving.engine(), faults=[Failure(400, "no prompt_logprobs here") for _ in range(8)])
    async with running(tmp_path, moving, engine) as run:
        await run.versions(3)
        assert not caplog.records
        await run.versions(2)
        assert run.watch.take() == {}
        await run.versions(1)
        assert "canary/noise/mean" in run.watch.take()
    (record,) = caplog.records
    assert "has not answered for the canaries of 3 versions" in record.getMessage()
    assert "no prompt_logprobs here" in record.getMessage()


async def test_noise_that_rounding_does_not_explain_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A temperature of 0.5, for one: the change is there, in logprobs that are far from the trainer's."""
    moving = MovingPolicy(change=0.001, noise=1e-6)
    answers = moving.engine()
    engine = ScriptedEngine(prompt_logprobs=lambda body: [value / 0.5 for value in answers(body)])
    with caplog.at_level(logging.WARNING):
        async with running(tmp_path, moving, engine) as run:
            await run.versions(2)
            await run.versions(2)
    (record,) = caplog.records
    assert "version 1: logprobs of engine 0" in record.getMessage()
    assert "temperature" in record.getMessage()


class FullRun:
    """Full weights: one set at a time, behind a pause."""

    def __init__(self, tmp_path: Path, policy: Policy, moving: MovingPolicy) -> None:
        self.tmp_path, self.policy, self.moving, self.version = tmp_path, policy, moving, 0

    async def swap(self) -> WeightsReady:
        self.version += 1
        canaries = [Canary(c.token_ids, c.logprobs, c.before) for c in self.moving.canaries(self.version)]
        ready = WeightsReady(self.version, "full", str(self.tmp_path), "a" * 64, canaries=canaries)
        await self.policy.swap(ready)
        return ready


@asynccontextmanager
async def full(tmp_path: Path, engine: ScriptedEngine, moving: MovingPolicy) -> AsyncIterator[tuple[FullRun, CanaryWatch]]:
    async with engine, InferenceClient([engine.url], model="base", request_timeout_s=5, max_retries=0) as client:
        policy = Policy(client, WeightsStore(tmp_path), stop_ids=[257])
        async with asyncio.TaskGroup() as group:
            yield FullRun(tmp_path, policy, moving), CanaryWatch(policy, group)


async def test_full_weights_are_judged_by_the_step_alone(tmp_path: Path):
    moving = MovingPolicy()
    engine = ScriptedEngine(digest="a" * 64, prompt_logprobs=moving.engine())
    async with full(tmp_path, engine, moving) as (run, watch):
        for _ in range(3):
            watch.ask(await run.swap())
            await watch._asking  # pyright: ignore
        metrics: dict[str, Any] = watch.take()
    assert "canary/change_shown/mean" in metrics
    assert not any(name.startswith("canary/adapter") for name in metrics)
    assert {body["model"] for body in engine.requests} == {"base"}
    wrong = ScriptedEngine(digest="a" * 64, prompt_logprobs=moving.engine("version before"))
    with pytest.RaisesGroup(CanaryAlarm):
        async with full(tmp_path, wrong, moving) as (run, watch):
            for _ in range(8):
                watch.ask(await run.swap())
                await watch._asking  # pyright: ignore


async def test_canaries_that_a_swap_of_full_weights_overtook_prove_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """They waited for the end of its pause, so that the version after theirs answered."""
    moving = MovingPolicy()
    engine = ScriptedEngine(digest="a" * 64, prompt_logprobs=moving.engine("no adapter"))
    async with full(tmp_path, engine, moving) as (run, watch):
        for _ in range(8):
            watch.ask(await run.swap())
            await run.swap()
            await watch._asking  # pyright: ignore
        assert len(engine.requests) == 8 * 2
        assert watch.take() == {}
    assert not caplog.records
