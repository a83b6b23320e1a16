"""Noise as the orchestrator asks for it and proves it, against engines with real norms and planted faults."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from support.fake_trainer import publish
from support.noisy_engine import NoisyEngine
from turnwise.config import RLConfig
from turnwise.inference.client import InferenceClient
from turnwise.inference.errors import EngineError
from turnwise.inference.noise import Stage, run_stage
from turnwise.inference.norms import module_norms
from turnwise.orchestrator.canary import CanaryWatch
from turnwise.orchestrator.noise import EngineNoise, WrongNoise, expected_norms
from turnwise.orchestrator.weights import Policy
from turnwise.transport import Canary, WeightsReady, WeightsStore

STEPS, STAGES, ENDS = 4, 4, (0.02, 0.0002)  # version 0 has no noise; 1, 2 and 3 have 0.02, 0.002 and 0.0002


def noise_for(client: InferenceClient, *, norms: int = 5, seed: int = 0) -> EngineNoise:
    return EngineNoise(client, lambda step: run_stage(step, steps=STEPS, stages=STAGES, ends=ENDS), seed=seed, norms=norms)


@asynccontextmanager
async def connected(*engines: NoisyEngine) -> AsyncIterator[InferenceClient]:
    for engine in engines:
        await engine.__aenter__()
    try:
        urls = [engine.url for engine in engines]
        async with InferenceClient(urls, model="base", request_timeout_s=5, max_retries=0) as client:
            yield client
    finally:
        for engine in engines:
            await engine.close()


@asynccontextmanager
async def serving(store: WeightsStore, engine: NoisyEngine, **options: Any) -> AsyncIterator[Policy]:
    async with connected(engine) as client:
        policy = Policy(client, store, stop_ids=[257], noise=noise_for(client), **options)
        yield policy
        await policy.close()


@pytest.fixture
def store(tmp_path: Path) -> WeightsStore:
    return WeightsStore(tmp_path / "weights")


def published(policy: Policy, version: int) -> WeightsReady:
    publish(policy.store, version)
    ready = policy.store.poll(version)
    assert ready is not None
    return ready


# --- the proof --------------------------------------------------------------------------------------------------------


async def test_the_noise_of_a_version_is_applied_measured_and_taken_away():
    engine = NoisyEngine()
    async with connected(engine) as client:
        noise = noise_for(client)
        sizes = [float(norm.read().square().mean().sqrt()) for norm in module_norms(engine.models[0])]
        await noise.apply(0)
        assert noise.metrics() == {
            "noise/stage": 0,
            "noise/sigma": 0,
            "noise/effective_sigma/mean": 0,
            "noise/changed/share": 0,
            "noise/relative_sigma/mean": 0,
        }
        await noise.apply(2)
        assert noise.metrics() == {
            "noise/stage": 2,
            "noise/sigma": pytest.approx(0.002),
            "noise/effective_sigma/mean": pytest.approx(0.002, rel=0.1),
            "noise/changed/share": pytest.approx(1, abs=0.01),
            "noise/relative_sigma/mean": pytest.approx(fmean(0.002 / size for size in sizes)),
        }
        await noise.clear()
        assert [sigma for sigma, _ in engine.applied] == [0, pytest.approx(0.002), 0]


async def test_every_engine_and_every_resume_gets_the_same_noise_for_a_version():
    one, two, again = NoisyEngine(workers=2), NoisyEngine(workers=2), NoisyEngine()
    async with connected(one, two) as client:
        noise = noise_for(client)
        for version in (0, 1, 2, 3):
            await noise.apply(version)
    async with connected(again) as client:
        resumed = noise_for(client)
        await resumed.apply(3)
    assert one.applied == two.applied
    assert again.applied[-1] == one.applied[-1]
    seeds = [seed for sigma, seed in one.applied if sigma]
    assert len(set(seeds)) == 3


async def test_another_run_seed_gives_another_noise():
    engine = NoisyEngine()
    async with connected(engine) as client:
        await noise_for(client, seed=0).apply(1)
        await noise_for(client, seed=1).clear()
        await noise_for(client, seed=1).apply(1)
    seeds = [seed for sigma, seed in engine.applied if sigma]
    assert len(set(seeds)) == 2


async def test_a_search_that_finds_no_norms_stops_the_run_before_there_is_any_noise():
    async with connected(NoisyEngine(blind=True)) as client:
        with pytest.raises(WrongNoise, match="worker 0 found 0 RMSNorm weights outside attention, and this model has 5"):
            await noise_for(client).apply(0)


async def test_norms_that_were_overlooked_stop_the_run():
    async with connected(NoisyEngine()) as client:
        with pytest.raises(WrongNoise, match="found 5 RMSNorm weights outside attention, and this model has 73"):
            await noise_for(client, norms=73).apply(1)


@pytest.mark.parametrize("version", [1, 3])
async def test_a_norm_that_does_not_change_is_named(version: int):
    """At the largest sigma and at the smallest."""
    async with connected(NoisyEngine(deaf=frozenset({"model.layers.1.post_attention_layernorm"}))) as client:
        with pytest.raises(WrongNoise, match=r"noise of sigma .* changed model.layers.1.post_attention_layernorm by 0; chance"):
            await noise_for(client).apply(version)


async def test_noise_that_piles_up_on_noise_is_found_out():
    async with connected(NoisyEngine(adds_up=True)) as client:
        noise = noise_for(client)
        noise.schedule = lambda step: run_stage(1, steps=STEPS, stages=STAGES, ends=ENDS)
        await noise.apply(1)
        with pytest.raises(WrongNoise, match=r"noise of sigma 0\.02 changed model"):
            await noise.apply(2)


async def test_ranks_with_different_noise_are_found_out():
    engine = NoisyEngine(workers=2)
    engine.seed_shift = 1
    async with connected(engine) as client:
        with pytest.raises(WrongNoise, match=r"the norms of worker 1 have the digest .* those of worker 0"):
            await noise_for(client).apply(1)


async def test_norms_that_are_not_the_clean_ones_without_noise_are_found_out():
    engine = NoisyEngine()
    async with connected(engine) as client:
        noise = noise_for(client)
        await noise.apply(1)
        engine.models[0].get_parameter("model.norm.weight").mul_(1.01)  # somebody else writes there
        with pytest.raises(WrongNoise, match="without noise the engines' norms have the digest"):
            await noise.clear()


async def test_an_engine_that_does_not_say_what_its_norms_hold_is_an_error():
    class Silent(NoisyEngine):
        def _apply(self, worker: int, sigma: float, seed: int) -> dict[str, object]:
            return {"norms": 5}

    async with connected(Silent()) as client:
        with pytest.raises(EngineError, match="apply_noise: a worker did not say what its norms hold"):
            await noise_for(client).apply(0)


@pytest.mark.parametrize(("weight", "warned"), [(0.25, True), (2.0, False)])
async def test_noise_that_is_large_beside_the_norms_is_warned_of_before_there_is_any(
    weight: float, warned: bool, caplog: pytest.LogCaptureFixture
):
    engine = NoisyEngine()
    with torch.no_grad():
        for norm in module_norms(engine.models[0]):
            norm.write(torch.full_like(norm.read(), weight))
    async with connected(engine) as client:
        noise = EngineNoise(client, lambda step: Stage(0, 0.0), seed=0, norms=5, loudest=0.05)
        with caplog.at_level(logging.WARNING):
            await noise.apply(0)
            await noise.apply(1)
    assert ["noise of sigma 0.05 is 20 % of this model's norm weights" in record.message for record in caplog.records] == (
        [True] if warned else []
    )


async def test_noise_that_rounding_eats_is_warned_of_once(caplog: pytest.LogCaptureFixture):
    engine = NoisyEngine()
    engine.models = [model.bfloat16() for model in engine.models]
    async with connected(engine) as client:
        noise = noise_for(client)
        with caplog.at_level(logging.WARNING):
            for version in (1, 2, 3):
                await noise.apply(version)
    (record,) = caplog.records
    assert "noise of sigma 0.002 changes" in record.message
    assert "inference.noise.float32_norms = true keeps it" in record.message
    assert noise.metrics()["noise/changed/share"] == 0  # of the last one, 0.0002
    assert noise.metrics()["noise/effective_sigma/mean"] == 0


# --- from the configuration -------------------------------------------------------------------------------------------


def test_the_norms_of_a_model_are_two_a_layer_and_one(tiny_model: Path, tmp_path: Path):
    assert expected_norms(str(tiny_model)) == 5
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 36}}))
    assert expected_norms(str(tmp_path)) == 73
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no num_hidden_layers"):
        expected_norms(str(tmp_path))


def test_the_schedule_of_a_run_counts_epochs_by_its_tasks(tiny_model: Path):
    tables = {"max_steps": 12, "model": {"name": str(tiny_model)}, "orchestrator": {"batch_size": 8, "rollouts_per_example": 4}}
    client: Any = None
    assert EngineNoise.of(RLConfig.model_validate(tables), client, examples=16) is None
    tables["inference"] = {"noise": {"stages": 3, "epoch_aware": True}}
    noise = EngineNoise.of(RLConfig.model_validate(tables), client, examples=16)  # 8 steps an epoch
    assert noise is not None
    assert [noise.schedule(step).number for step in range(12)] == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="epoch_aware = true"):
        EngineNoise.of(RLConfig.model_validate(tables), client, examples=1)


# --- swaps and evaluations --------------------------------------------------------------------------------------------


async def test_while_there_is_no_noise_adapters_are_swapped_without_a_pause(store: WeightsStore):
    engine = NoisyEngine()
    async with serving(store, engine) as policy:
        assert policy.noise is not None
        policy.noise.schedule = lambda step: run_stage(0, steps=STEPS, stages=STAGES, ends=ENDS)
        await policy.swap(published(policy, 0))
        engine.admin.clear()
        await policy.swap(published(policy, 1))
        assert engine.admin[:2] == ["load v1", "weights_digest"]
        assert not any(word.startswith(("pause", "apply_noise")) for word in engine.admin)


async def test_a_version_with_noise_pauses_the_engine_and_empties_its_prefix_cache(store: WeightsStore):
    engine = NoisyEngine()
    async with serving(store, engine) as policy:
        await policy.swap(published(policy, 0))
        engine.admin.clear()
        await policy.swap(published(policy, 1))
        expected = ["load v1", "weights_digest", "pause abort", "apply_noise 0.02", "reset_prefix_cache", "resume"]
        assert engine.admin[:6] == expected
        await policy.swap(published(policy, 2))
        assert engine.applied[-1][0] == pytest.approx(0.002)


async def test_a_request_that_noise_cuts_goes_on_with_its_adapter_and_keeps_what_it_has(store: WeightsStore):
    engine = NoisyEngine(script=[[5] * 8, [5] * 8], latency_s=0.15)
    async with serving(store, engine) as policy:
        await policy.swap(published(policy, 0))
        request = asyncio.create_task(policy.generator(temperature=1.0, affinity="a")([1], 8, 1))
        await engine.busy.wait()
        await policy.swap(published(policy, 1))
        reply = await request
    assert reply.spans == ((0, 8),)
    assert reply.logprobs == (-1.0,) * 4 + (-1.02,) * 4  # each token's is that of the policy which sampled it
    assert [body["model"] for body in engine.requests] == ["v0", "v0"]


async def test_full_weights_are_replaced_and_proven_without_noise_and_get_their_own(store: WeightsStore, tmp_path: Path):
    engine = NoisyEngine(digest="a" * 64)
    async with serving(store, engine) as policy:
        for version in (0, 1):
            await policy.swap(WeightsReady(version, "full", str(tmp_path), "a" * 64))
        words = [word for word in engine.admin if word != "reset_prefix_cache"]
        first = ["pause abort", "apply_noise 0", "reload_weights", "weights_digest", "apply_noise 0", "resume"]
        second = [*first[:-1], "apply_noise 0.02", "resume"]
        assert words == first + second


async def test_an_evaluation_is_sampled_without_noise_while_training_waits_and_then_noise_is_as_before(store: WeightsStore):
    engine = NoisyEngine(script=[[5] * 8], latency_s=0.1)
    async with serving(store, engine) as policy:
        await policy.swap(published(policy, 1))
        noisy = engine.applied[-1]
        training = asyncio.create_task(policy.generator(temperature=1.0, affinity="t")([1], 8, 1))
        await engine.busy.wait()
        with policy.pinned(1):
            swap = asyncio.create_task(policy.swap(published(policy, 2)))
            async with policy.without_noise():
                reply = await policy.generator(temperature=1.0, affinity="e", version=1)([1], 8, 1)
                assert reply.logprobs == (-1.0,) * 8
                assert not training.done()
            assert engine.applied[-1] == noisy
            assert policy.version == 1  # what is pinned is to be sampled without noise: the swap has waited
        await swap
        assert (await training).logprobs[:4] == (-1.02,) * 4
        assert engine.applied[-1][0] == pytest.approx(0.002)


async def test_a_run_without_noise_is_not_paused_for_an_evaluation(store: WeightsStore):
    engine = NoisyEngine()
    async with connected(engine) as client:
        policy = Policy(client, store, stop_ids=[])
        async with policy.without_noise():
            assert engine.admin == []
        assert policy.noise_metrics() == {}


async def test_canaries_are_not_asked_for_in_a_run_with_noise(store: WeightsStore):
    """Not even while a stage has none, since the next version's engines compute with another policy on purpose."""
    engine = NoisyEngine()
    async with serving(store, engine) as policy, asyncio.TaskGroup() as group:
        watch = CanaryWatch(policy, group)
        publish(store, 1, canaries=[Canary([1, 2, 3], [-9.0, -9.0], [-1.0, -1.0])])
        ready = store.poll(1)
        assert ready is not None
        await policy.swap(ready)
        watch.ask(ready)
        await asyncio.sleep(0.05)
        assert engine.requests == []
        assert watch.take() == {}
