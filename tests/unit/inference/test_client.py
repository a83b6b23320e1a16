"""The client against an engine of the real routes with planted failures."""

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from support.scripted_engine import Fault, ScriptedEngine
from turnwise.inference import Completion, EngineError, EngineUnavailable, InferenceClient, administration
from turnwise.inference import client as client_module


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(administration, "BACKOFF_S", 0.001)


@asynccontextmanager
async def opened(*engines: ScriptedEngine, retries: int = 2, timeout_s: float = 20.0) -> AsyncGenerator[InferenceClient]:
    urls = [engine.url for engine in engines]
    async with InferenceClient(urls, model="base", request_timeout_s=timeout_s, max_retries=retries) as client:
        yield client


async def ask(client: InferenceClient, prompt: list[int] | None = None, **changes: Any) -> Completion:
    options: dict[str, Any] = {"version": None, "max_tokens": 4, "temperature": 1.0, "seed": 0, "stop_token_ids": [], **changes}
    return await client.generate(prompt or [1, 2, 3], **options)


async def test_a_reply_carries_ids_logprobs_reason_and_version() -> None:
    async with ScriptedEngine([[5, 6, 2]], logprob=-0.5) as engine, opened(engine) as client:
        await client.load_adapter(7, "/adapter")
        reply = await ask(client, version=7, stop_token_ids=[2])
    assert reply == Completion((5, 6, 2), (-0.5, -0.5, -0.5), "stop", ((7, 3),))


async def test_the_request_asks_for_ids_and_logprobs_in_the_form_of_vllm() -> None:
    async with ScriptedEngine([[5]]) as engine, opened(engine) as client:
        await ask(client, temperature=0.0, seed=11, stop_token_ids=(9,), max_tokens=1)
    assert engine.requests == [
        {
            "model": "base",
            "prompt": [1, 2, 3],
            "max_tokens": 1,
            "temperature": 0.0,
            "seed": 11,
            "logprobs": 0,
            "stop_token_ids": [9],
            "return_token_ids": True,
            "add_special_tokens": False,
        }
    ]


@pytest.mark.parametrize("fault", [503, 500, "drop"])
async def test_a_passing_failure_is_repeated(fault: int | str) -> None:
    async with ScriptedEngine([[5]], faults=[Fault(fault), Fault(fault)]) as engine, opened(engine) as client:
        assert (await ask(client)).token_ids == (5,)
    assert not engine.faults


async def test_repetitions_are_bounded_and_the_last_reason_is_told() -> None:
    faults = [Fault(503, "model is melting")] * 5
    async with ScriptedEngine([[5]], faults=faults) as engine, opened(engine, retries=2) as client:
        with pytest.raises(EngineUnavailable, match=r"after 3 attempts.*503.*model is melting"):
            await ask(client)
    assert len(engine.faults) == 2


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_a_refusal_is_told_in_the_words_of_the_engine_and_not_repeated(status: int) -> None:
    async with ScriptedEngine([[5]], faults=[Fault(status, "no such thing")] * 2) as engine, opened(engine) as client:
        with pytest.raises(EngineError, match=f"HTTP {status}: no such thing"):
            await ask(client)
    assert len(engine.faults) == 1


async def test_an_engine_that_never_answers_meets_the_deadline() -> None:
    async with ScriptedEngine([[5]], faults=[Fault("hang")]) as engine, opened(engine, retries=0, timeout_s=0.2) as client:
        with pytest.raises(EngineUnavailable, match="TimeoutError"):
            await ask(client)


async def test_an_administrative_request_meets_its_deadline_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(administration, "ADMIN_TIMEOUT_S", 0.2)
    fault = Fault("hang", path="/v1/load_lora_adapter")
    async with ScriptedEngine(faults=[fault]) as engine, opened(engine, retries=0) as client:
        with pytest.raises(EngineUnavailable, match="load_lora_adapter"):
            await client.load_adapter(1, "/adapter")


async def test_the_next_attempt_goes_to_another_replica() -> None:
    async with (
        ScriptedEngine([[5]], faults=[Fault("drop")] * 3) as broken,
        ScriptedEngine([[6]]) as sound,
        opened(broken, sound, retries=1) as client,
    ):
        replies = [await ask(client) for _ in range(4)]
    assert [reply.token_ids for reply in replies] == [(6,)] * 4
    assert len(broken.faults) == 2  # after its failure it is avoided


async def test_a_dead_replica_is_asked_again_when_no_other_is_left() -> None:
    async with ScriptedEngine([[5]], faults=[Fault("drop")] * 2) as engine, opened(engine, retries=0) as client:
        for _ in range(2):
            with pytest.raises(EngineUnavailable):
                await ask(client)
        assert (await ask(client)).token_ids == (5,)


async def test_requests_spread_over_replicas_by_load() -> None:
    async with ScriptedEngine(latency_s=0.1) as one, ScriptedEngine(latency_s=0.1) as two, opened(one, two) as client:
        await asyncio.gather(*(ask(client, seed=i) for i in range(20)))
    assert len(one.requests) == len(two.requests) == 10


async def test_a_conversation_stays_on_its_replica() -> None:
    async with ScriptedEngine() as one, ScriptedEngine() as two, opened(one, two) as client:
        for turn in range(6):
            await ask(client, [turn], affinity="a")
            await asyncio.gather(*(ask(client, [99], affinity=f"other {turn}") for _ in range(2)))
    homes = [sum(request["prompt"] != [99] for request in engine.requests) for engine in (one, two)]
    assert sorted(homes) == [0, 6]


async def test_an_aborted_reply_goes_on_where_it_was_cut_under_the_next_version() -> None:
    async with ScriptedEngine([[5, 6, 7, 8], [9, 10]], latency_s=0.2) as engine, opened(engine) as client:
        client.set_served(3)
        request = asyncio.create_task(ask(client, max_tokens=4, seed=1))
        await engine.busy.wait()
        await client.pause()
        client.set_served(4)
        await asyncio.sleep(0.05)
        assert len(engine.requests) == 1  # nothing is sent between pause and resume
        await client.resume()
        reply = await request
    assert reply.token_ids == (5, 6, 9, 10)
    assert reply.finish_reason == "length"
    assert sum(count for _, count in reply.spans) == 4
    second = engine.requests[1]
    assert second["prompt"] == [1, 2, 3, 5, 6]
    assert second["max_tokens"] == 2
    assert second["seed"] != 1
    assert engine.admin == ["pause abort", "reset_prefix_cache", "resume"]


async def test_the_spans_name_the_version_that_sampled_each_part() -> None:
    async with ScriptedEngine([[5, 6, 7, 8], [9, 10]], latency_s=0.2) as engine, opened(engine) as client:
        client.set_served(3)
        request = asyncio.create_task(ask(client, max_tokens=4))
        await engine.busy.wait()
        await client.pause()
        await asyncio.sleep(0.05)  # the cut reply arrives
        client.set_served(4)
        await client.resume()
        assert (await request).spans == ((3, 2), (4, 2))


async def test_a_part_that_is_slow_to_come_back_belongs_to_the_version_that_sampled_it() -> None:
    async with ScriptedEngine([[5, 6, 7, 8], [9, 10]], latency_s=0.3, answer_s=0.1) as engine, opened(engine) as client:
        client.set_served(3)
        request = asyncio.create_task(ask(client, max_tokens=4))
        await engine.busy.wait()
        await client.pause()
        assert engine.running == 0  # nothing is under way while weights change
        client.set_served(4)
        await client.resume()
        assert (await request).spans == ((3, 2), (4, 2))


async def test_a_request_that_arrives_in_a_pause_is_not_kept_for_other_weights_under_its_old_version() -> None:
    async with ScriptedEngine(arrival_s=0.1) as engine, opened(engine) as client:
        engine.script = lambda body: [engine.reloads] * 4  # a token says which weights made it
        client.set_served(0)
        request = asyncio.create_task(ask(client, max_tokens=4))
        await engine.busy.wait()
        await client.pause()
        await client.reload_weights("/weights/v1")
        client.set_served(1)
        await client.resume()
        reply = await request
    assert (reply.token_ids, reply.spans) == ((1, 1, 1, 1), ((1, 4),))
    assert engine.admin[:2] == ["pause abort", "pause abort"]


async def test_a_request_that_does_not_come_back_ends_the_pause_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "ADMIN_TIMEOUT_S", 0.3)
    monkeypatch.setattr(client_module, "REPAUSE_S", 0.1)
    async with ScriptedEngine([[5]], faults=[Fault("hang")]) as engine, opened(engine, retries=0) as client:
        request = asyncio.create_task(ask(client))
        await asyncio.sleep(0.05)
        with pytest.raises(EngineUnavailable, match=r"still under way 0\.3 s after POST /pause"):
            await client.pause()
        request.cancel()


async def test_a_retry_after_a_swap_is_of_the_new_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(administration, "BACKOFF_S", 0.2)
    async with ScriptedEngine([[5, 6]], faults=[Fault(503)]) as engine, opened(engine) as client:
        client.set_served(3)
        request = asyncio.create_task(ask(client, max_tokens=2))
        for _ in range(500):
            await asyncio.sleep(0.01 if engine.faults else 0)
        await client.pause()
        client.set_served(4)
        await client.resume()
        assert (await request).spans == ((4, 2),)


async def test_weights_are_received_once_by_every_engine_each_under_ranks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []
    original = ScriptedEngine._rpc

    async def rpc(engine: ScriptedEngine, request: web.Request) -> web.Response:
        seen.append((engine.url, await request.json()))
        return await original(engine, request)

    monkeypatch.setattr(ScriptedEngine, "_rpc", rpc)
    async with ScriptedEngine() as one, ScriptedEngine() as two, opened(one, two) as client:
        await client.receive_weights("127.0.0.1:7", "/weights/v3", workers=4)
        calls = {url: body["args"] for url, body in seen}
        assert calls == {one.url: ["127.0.0.1:7", "/weights/v3", 1], two.url: ["127.0.0.1:7", "/weights/v3", 3]}
        one.faults.append(Fault(503, path="/collective_rpc"))
        with pytest.raises(EngineUnavailable, match="after 1 attempts"):
            await client.receive_weights("127.0.0.1:7", "/weights/v4", workers=4)


async def test_a_request_that_is_given_up_as_the_pause_ends_is_not_sent() -> None:
    async with ScriptedEngine([[5]]) as engine, opened(engine) as client:
        await client.pause()
        request = asyncio.create_task(ask(client))
        await asyncio.sleep(0.05)
        await client.resume()
        request.cancel()  # before the request has seen that it may go on
        with pytest.raises(asyncio.CancelledError):
            await request
        assert engine.requests == []


async def test_a_pause_that_never_ends_meets_the_deadline() -> None:
    async with ScriptedEngine([[5]]) as engine, opened(engine, timeout_s=0.2) as client:
        await client.pause()
        with pytest.raises(EngineUnavailable, match="paused for more than"):
            await ask(client)


async def test_adapters_are_loaded_and_unloaded_on_every_replica() -> None:
    async with ScriptedEngine() as one, ScriptedEngine() as two, opened(one, two) as client:
        await client.load_adapter(3, "/weights/v3")
        assert one.adapters == two.adapters == {"v3": "/weights/v3"}
        await client.unload_adapter(3)
        assert one.adapters == two.adapters == {}


async def test_loading_twice_is_an_error_unless_the_first_answer_was_lost() -> None:
    async with ScriptedEngine() as engine, opened(engine) as client:
        await client.load_adapter(3, "/weights/v3")
        with pytest.raises(EngineError, match="already been loaded"):
            await client.load_adapter(3, "/weights/v3")
        engine.faults.append(Fault(503, path="/v1/load_lora_adapter"))
        await client.load_adapter(3, "/weights/v3")


async def test_a_replica_that_refuses_an_adapter_fails_the_whole_load() -> None:
    fault = Fault(400, "wrong shape", path="/v1/load_lora_adapter")
    async with ScriptedEngine() as one, ScriptedEngine(faults=[fault]) as two, opened(one, two) as client:
        with pytest.raises(EngineError, match="wrong shape"):
            await client.load_adapter(3, "/weights/v3")


async def test_digests_come_one_a_replica() -> None:
    async with ScriptedEngine(digest="a") as one, ScriptedEngine(digest="b") as two, opened(one, two) as client:
        assert await client.digest(3) == ["a", "b"]


async def test_what_a_worker_could_not_do_is_an_error_with_its_words_and_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedEngine, "_true_digest", lambda engine, name: {"error": f"no adapter {name} was loaded"})
    async with ScriptedEngine(digest="a") as one, ScriptedEngine() as two, opened(one, two) as client:
        with pytest.raises(EngineError, match=rf"weights_digest {two.url}: no adapter v3 was loaded"):
            await client.digest(3)


@pytest.mark.parametrize(("answer", "stays_paused"), [(b'{"success": false}', True), (b'{"success": true}', False), (b"", False)])
async def test_generation_goes_on_only_with_an_empty_prefix_cache(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, stays_paused: bool
) -> None:
    async def reset(engine: ScriptedEngine, request: web.Request) -> web.Response:
        return web.Response(body=answer)

    monkeypatch.setattr(ScriptedEngine, "_reset", reset)
    async with ScriptedEngine([[5]]) as engine, opened(engine, timeout_s=0.2) as client:
        await client.pause()
        if stays_paused:
            with pytest.raises(EngineError, match="could not empty its prefix cache"):
                await client.resume()
            assert "resume" not in engine.admin
        else:
            await client.resume()
            assert engine.admin[-1] == "resume"


async def test_prompt_logprobs_have_one_value_less_than_ids() -> None:
    async with ScriptedEngine(logprob=-0.25) as engine, opened(engine) as client:
        assert await client.prompt_logprobs([4, 5, 6, 4], version=None) == [-0.25] * 3


async def test_logprobs_are_asked_of_one_engine_and_no_other() -> None:
    async with ScriptedEngine() as one, ScriptedEngine(faults=[Fault(503)]) as other, opened(one, other) as client:
        for _ in range(3):
            await client.prompt_logprobs([4, 5], version=None, replica=client.replicas.all[1])
    assert (len(one.requests), len(other.requests)) == (0, 3)


@pytest.mark.parametrize("given", [1, 3])
async def test_logprobs_of_too_few_or_too_many_tokens_are_refused(given: int) -> None:
    async with ScriptedEngine() as engine, opened(engine) as client:
        answer = engine._answer  # pyright: ignore[reportPrivateUsage]
        engine._answer = lambda body, ids, reason: answer({**body, "prompt": [4] * (given + 1)}, ids, reason)  # pyright: ignore
        with pytest.raises(EngineError, match="prompt_logprobs for"):
            await client.prompt_logprobs([4, 4, 4], version=None)


async def test_waiting_for_a_dead_engine_ends_at_the_deadline() -> None:
    async with ScriptedEngine() as engine:
        url = engine.url
    async with InferenceClient([url], model="base", request_timeout_s=1.0, max_retries=0) as client:
        with pytest.raises(EngineUnavailable, match="did not answer within"):
            await client.wait_healthy(0.3)


async def test_a_reply_with_fewer_logprobs_than_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(self: ScriptedEngine, body: Any, ids: Any, reason: str) -> dict[str, Any]:
        return {"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "stop"}]}

    monkeypatch.setattr(ScriptedEngine, "_answer", short)
    async with ScriptedEngine([[1, 2]]) as engine, opened(engine) as client:
        with pytest.raises(EngineError, match="2 token ids with 1 logprobs"):
            await ask(client)


@pytest.mark.parametrize(("version", "told"), [(None, 3), (7, 7)])
async def test_logits_that_are_not_finite_are_told_with_engine_version_and_token_and_asked_for_once(
    version: int | None, told: int
) -> None:
    async with ScriptedEngine([[5, 6]], logprob=math.nan, require_adapters=False) as engine, opened(engine) as client:
        client.set_served(3)
        words = (
            rf"^{engine.url}: the logits of policy version {told} are not finite: .* token 1 of the reply, id 5, is null\. .*lr"
        )
        with pytest.raises(EngineError, match=words):
            await ask(client, version=version)
        assert len(engine.requests) == 1
        with pytest.raises(
            EngineError, match=rf"policy version {told} .* token 1 of the prompt after its first token, id 8, is nu"
        ):
            await client.prompt_logprobs([9, 8], version=version)


@pytest.mark.parametrize(("status", "kind"), [(400, EngineError), (500, EngineUnavailable)])
async def test_a_route_of_vllm_that_cannot_write_nan_is_told_as_what_it_means(status: int, kind: type[Exception]) -> None:
    fault = Fault(status, "Out of range float values are not JSON compliant")
    async with ScriptedEngine(faults=[fault]) as engine, opened(engine, retries=0) as client:
        with pytest.raises(kind, match=rf"HTTP {status}: Out of range float .*\. The logits are not finite\. .*optim\.lr"):
            await client.prompt_logprobs([9, 8], version=None)


PAGE = b"<html>Bad gateway, but with status 200</html>"


async def test_an_answer_that_is_no_completion_is_told_with_its_engine_and_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    async def page(engine: ScriptedEngine, request: web.Request) -> web.Response:
        return web.Response(body=PAGE)

    for route in ("_completions", "_rpc", "_reset"):
        monkeypatch.setattr(ScriptedEngine, route, page)
    async with ScriptedEngine() as engine, opened(engine) as client:
        for where, request in (
            (f"POST {engine.url}/v1/completions", ask(client)),
            (f"weights_digest {engine.url}", client.digest(3)),
            ("POST /reset_prefix_cache", client.resume()),
        ):
            with pytest.raises(EngineError, match=f"^{where}: the answer cannot be read: JSON is malformed.*<html>Bad gateway"):
                await request


async def test_a_client_that_is_not_open_says_how_to_open_it() -> None:
    client = InferenceClient(["http://127.0.0.1:1"], model="base", request_timeout_s=1.0, max_retries=0)
    with pytest.raises(RuntimeError, match="async with"):
        await ask(client)


def test_a_completion_whose_lengths_differ_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="lengths differ"):
        Completion((1, 2), (-1.0,), "stop", ((0, 2),))
