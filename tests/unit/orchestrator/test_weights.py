"""Swaps against an engine that speaks the real routes: proof, acknowledgement, unloading, pins, slots."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from support.fake_trainer import publish
from support.scripted_engine import Fault, ScriptedEngine
from turnwise.inference.client import InferenceClient
from turnwise.inference.errors import EngineError
from turnwise.orchestrator.weights import Policy, WrongWeights
from turnwise.transport import Manifest, WeightsReady, WeightsStore


@asynccontextmanager
async def serving(engine: ScriptedEngine, store: WeightsStore, *, max_loaded: int | None = None) -> AsyncIterator[Policy]:
    async with engine, InferenceClient([engine.url], model="base", request_timeout_s=5, max_retries=0) as client:
        policy = Policy(client, store, stop_ids=[257], max_loaded=max_loaded)
        yield policy
        await policy.close()


async def _swap(policy: Policy, version: int) -> None:
    publish(policy.store, version)
    ready = policy.store.poll(version)
    assert ready is not None
    await policy.swap(ready)


@pytest.fixture
def store(tmp_path: Path) -> WeightsStore:
    return WeightsStore(tmp_path / "weights")


async def test_a_version_is_proven_then_acknowledged_then_used(store: WeightsStore):
    engine = ScriptedEngine()
    async with serving(engine, store) as policy:
        await _swap(policy, 0)
        assert engine.admin == ["load v0", "weights_digest"]
        assert (store.served(), policy.version) == (0, 0)
        await _swap(policy, 1)
        generate = policy.generator(temperature=0.7, affinity="g0-0")
        reply = await generate([1, 2], 4, 99)
        assert reply.spans == ((1, len(reply.token_ids)),)
        body = engine.requests[0]
        assert (body["model"], body["seed"], body["temperature"], body["max_tokens"]) == ("v1", 99, 0.7, 4)
        assert body["stop_token_ids"] == [257]
        assert policy.sampled_tokens == len(reply.token_ids)
    assert store.served() == 1


async def test_without_request_seeds_only_pinned_versions_have_them(store: WeightsStore):
    engine = ScriptedEngine()
    async with serving(engine, store) as policy:
        await _swap(policy, 0)
        policy.seeds = False
        await policy.generator(temperature=1.0, affinity="g0-0")([1, 2], 4, 99)
        with policy.pinned(0):
            await policy.generator(temperature=1.0, affinity="e", version=0)([1, 2], 4, 98)
    assert [body.get("seed") for body in engine.requests] == [None, 98]


async def test_an_engine_with_other_tensors_stops_the_run_and_is_not_acknowledged(store: WeightsStore):
    async with serving(ScriptedEngine(digest="f" * 64), store) as policy:
        with pytest.raises(WrongWeights, match="version 0: engine 0 holds tensors with the digest ffffffffffffffff"):
            await _swap(policy, 0)
        assert policy.version == -1
    assert not (store.root / "served.json").exists()


async def test_an_adapter_that_the_engine_refuses_stops_the_run_with_its_words(store: WeightsStore):
    engine = ScriptedEngine(faults=[Fault(400, "no such tensor", "/v1/load_lora_adapter")])
    async with serving(engine, store) as policy:
        with pytest.raises(EngineError, match="no such tensor"):
            await _swap(policy, 0)


async def test_a_running_request_keeps_its_adapter_until_it_is_done(store: WeightsStore):
    engine = ScriptedEngine(latency_s=0.2)
    async with serving(engine, store) as policy:
        await _swap(policy, 0)
        request = asyncio.create_task(policy.generator(temperature=1.0, affinity="a")([1], 4, 1))
        await asyncio.sleep(0.05)
        await _swap(policy, 1)
        assert "unload v0" not in engine.admin
        assert policy.requests == 1
        reply = await request
        assert reply.spans[0][0] == 0
        await asyncio.sleep(0.05)
        assert "unload v0" in engine.admin
        assert list(engine.adapters) == ["v1"]


async def test_a_pinned_version_stays_loaded_and_is_sampled_by_name(store: WeightsStore):
    engine = ScriptedEngine()
    async with serving(engine, store) as policy:
        await _swap(policy, 0)
        with policy.pinned(0):
            await _swap(policy, 1)
            await _swap(policy, 2)
            await asyncio.sleep(0.05)
            assert sorted(engine.adapters) == ["v0", "v2"]
            await policy.generator(temperature=1.0, affinity="e", version=0)([1], 2, 1)
            assert engine.requests[-1]["model"] == "v0"
            assert policy.requests == 0
        await asyncio.sleep(0.05)
        assert list(engine.adapters) == ["v2"]


async def test_a_swap_waits_while_every_adapter_slot_is_in_use(store: WeightsStore):
    engine = ScriptedEngine()
    async with serving(engine, store, max_loaded=2) as policy:
        await _swap(policy, 0)
        with policy.pinned(0):
            await _swap(policy, 1)
            swap = asyncio.create_task(_swap(policy, 2))
            await asyncio.sleep(0.1)
            assert not swap.done()
            assert len(engine.adapters) == 2
        await asyncio.wait_for(swap, 5)
        assert policy.version == 2


async def test_full_weights_are_replaced_between_pause_and_resume_and_proven(store: WeightsStore, tmp_path: Path):
    engine = ScriptedEngine(script=[[5] * 8], digest="a" * 64, latency_s=0.2)
    async with serving(engine, store) as policy:
        ready = WeightsReady(3, "full", str(tmp_path), "a" * 64)
        policy.kind = "full"
        request = asyncio.create_task(policy.generator(temperature=1.0, affinity="a")([1], 8, 1))
        await asyncio.sleep(0.05)
        await policy.swap(ready)
        assert engine.admin == ["pause abort", "reload_weights", "weights_digest", "reset_prefix_cache", "resume"]
        reply = await request
        assert [version for version, _ in reply.spans] == [0, 3]  # went on with the new weights
        assert store.served() == 3
        with pytest.raises(WrongWeights):
            await policy.swap(WeightsReady(4, "full", str(tmp_path), "b" * 64))
        assert engine.admin[-1] == "weights_digest"  # not resumed: nothing is sampled from what could not be proven
        assert (store.served(), policy.version, policy.client.served) == (3, 3, 3)


async def test_a_broadcast_is_claimed_once_the_engines_are_paused_and_received_by_ranks_from_one(
    store: WeightsStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    engine = ScriptedEngine(digest="a" * 64)
    claimed: list[tuple[list[str], bool]] = []
    received: list[tuple[object, ...]] = []

    async def receive_weights(rendezvous: str, folder: str, *, workers: int) -> None:
        claimed.append((list(engine.admin), store.claim_path(5).exists()))
        received.append((rendezvous, folder, workers))

    ready = WeightsReady(5, "full", str(store.path(5)), "a" * 64, transfer="broadcast", rendezvous="127.0.0.1:7")
    store.publish(ready, Manifest(5, "gloo", 3, []).write)
    async with serving(engine, store) as policy:
        monkeypatch.setattr(policy.client, "receive_weights", receive_weights)
        await policy.swap(ready)
        assert claimed == [(["pause abort"], True)]
        assert received == [("127.0.0.1:7", str(store.path(5)), 2)]
        assert engine.admin == ["pause abort", "weights_digest", "reset_prefix_cache", "resume"]
        assert (store.served(), policy.client.served) == (5, 5)


async def test_a_broadcast_that_was_claimed_is_received_although_the_run_ends(
    store: WeightsStore, monkeypatch: pytest.MonkeyPatch
):
    """The trainer sends once it is claimed, and would wait for engines that nobody told."""
    received: list[str] = []

    async def receive_weights(rendezvous: str, folder: str, *, workers: int) -> None:
        await asyncio.sleep(0.2)
        received.append(folder)

    ready = WeightsReady(1, "full", str(store.path(1)), "a" * 64, transfer="broadcast", rendezvous="127.0.0.1:7")
    store.publish(ready, Manifest(1, "gloo", 2, []).write)
    async with serving(ScriptedEngine(digest="a" * 64), store) as policy:
        monkeypatch.setattr(policy.client, "receive_weights", receive_weights)
        swap = asyncio.create_task(policy.swap(ready))
        for _ in range(500):
            await asyncio.sleep(0 if store.claim_path(1).exists() else 0.01)
        swap.cancel()
        with pytest.raises(asyncio.CancelledError):
            await swap
        assert received == []
    assert received == [str(store.path(1))]
    assert policy.version == -1


async def test_a_broadcast_under_an_evaluation_is_not_claimed(store: WeightsStore):
    engine = ScriptedEngine(digest="a" * 64)
    ready = WeightsReady(1, "full", str(store.path(1)), "a" * 64, transfer="broadcast", rendezvous="127.0.0.1:7")
    store.publish(ready, Manifest(1, "gloo", 2, []).write)
    async with serving(engine, store) as policy:
        with policy.pinned(0):
            swap = asyncio.create_task(policy.swap(ready))
            await asyncio.sleep(0.1)
            assert not store.claim_path(1).exists()
            assert engine.admin == []
        await asyncio.wait_for(swap, 5)
        assert store.claim_path(1).exists()


async def test_full_weights_are_not_swapped_under_an_evaluation(store: WeightsStore, tmp_path: Path):
    engine = ScriptedEngine(digest="a" * 64)
    async with serving(engine, store) as policy:
        await policy.swap(WeightsReady(1, "full", str(tmp_path), "a" * 64))
        with policy.pinned(1), policy.pinned(1):
            swap = asyncio.create_task(policy.swap(WeightsReady(2, "full", str(tmp_path), "a" * 64)))
            await asyncio.sleep(0.1)
            assert not swap.done()
        await asyncio.wait_for(swap, 5)
        assert policy.version == 2
