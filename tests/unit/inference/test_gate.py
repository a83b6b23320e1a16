"""Who may send a request while engines are changed, or set up for an evaluation."""

import asyncio

import pytest

from support.scripted_engine import ScriptedEngine
from turnwise.inference.client import InferenceClient
from turnwise.inference.errors import EngineUnavailable
from turnwise.inference.gate import Gate, Open


@pytest.mark.parametrize(
    ("state", "training", "evaluation"),
    [(Open.ALL, True, True), (Open.EVALUATION, False, True), (Open.NONE, False, False)],
)
async def test_a_request_passes_when_the_gate_is_open_to_it(state: Open, training: bool, evaluation: bool):
    gate = Gate()
    gate.set(state)
    for of_evaluation, passes in ((False, training), (True, evaluation)):
        waiting = asyncio.create_task(gate.passed(evaluation=of_evaluation, timeout_s=60))
        await asyncio.sleep(0.01)
        assert waiting.done() is passes
        waiting.cancel()


async def test_what_waits_goes_on_when_its_turn_comes_and_not_before():
    gate = Gate()
    gate.set(Open.NONE)
    training = asyncio.create_task(gate.passed(evaluation=False, timeout_s=60))
    evaluation = asyncio.create_task(gate.passed(evaluation=True, timeout_s=60))
    await asyncio.sleep(0.01)
    gate.set(Open.EVALUATION)
    await asyncio.wait_for(evaluation, 1)
    gate.set(Open.NONE)
    await asyncio.sleep(0.01)
    assert not training.done()
    gate.set(Open.ALL)
    await asyncio.wait_for(training, 1)


async def test_a_closed_gate_is_waited_for_within_the_limit_and_an_evaluation_without_one():
    gate = Gate()
    gate.set(Open.EVALUATION)
    training = asyncio.create_task(gate.passed(evaluation=False, timeout_s=0.01))
    await asyncio.sleep(0.1)
    assert not training.done()
    gate.set(Open.NONE)
    with pytest.raises(TimeoutError):
        await training


def client_of(engine: ScriptedEngine, *, timeout_s: float = 20) -> InferenceClient:
    return InferenceClient([engine.url], model="base", request_timeout_s=timeout_s, max_retries=0)


async def ask(client: InferenceClient, *, evaluation: bool) -> int:
    reply = await client.generate(
        [1, 2], version=None, max_tokens=8, temperature=1.0, seed=3, stop_token_ids=[], evaluation=evaluation
    )
    return len(reply.token_ids)


async def test_an_evaluation_has_the_engines_to_itself_and_training_goes_on_where_it_was_cut():
    async with ScriptedEngine(latency_s=0.15) as engine, client_of(engine) as client:
        training = asyncio.create_task(ask(client, evaluation=False))
        await engine.busy.wait()
        await client.pause()
        await client.resume(evaluation=True)
        late = asyncio.create_task(ask(client, evaluation=False))
        assert await ask(client, evaluation=True) == 8
        assert not training.done()
        assert not late.done()
        assert [body["max_tokens"] for body in engine.requests] == [8, 8]  # the one that was cut, and that of the evaluation
        await client.pause()
        await client.resume()
        assert await asyncio.gather(training, late) == [8, 8]
        assert sorted(body["max_tokens"] for body in engine.requests[2:]) == [4, 8]  # the first went on with its other half


async def test_a_pause_that_never_ends_is_told_as_such():
    async with ScriptedEngine() as engine, client_of(engine, timeout_s=0.2) as client:
        await client.pause()
        with pytest.raises(EngineUnavailable, match="generation was paused for more than"):
            await ask(client, evaluation=True)
