"""What engines say of their load: read from pages as vLLM writes them, asked for again and again, and missed when it fails."""

import asyncio
import logging
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.scripted_engine import Fault, ScriptedEngine
from turnwise.inference.load import EngineLoad, LoadWatch, parse_load
from turnwise.inference.replicas import Replica

PAGE = b"""# HELP python_info Python platform information
# TYPE python_info gauge
python_info{implementation="CPython",major="3"} 1.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a}b 7"} 12.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 3.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="deferred"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.96
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1.6384e+04
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 8192.0
vllm:prefix_cache_hits_created{engine="0",model_name="m"} 1.7e+09
vllm:num_preemptions_total{engine="0",model_name="m"} 4.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 500.0
vllm:generation_tokens_total{engine="0",model_name="m"} 600.0"""


def test_a_page_is_read_whatever_its_labels_hold_and_longer_names_are_not_mistaken() -> None:
    assert parse_load(PAGE) == EngineLoad(
        running=12.0,
        waiting=3.0,
        kv_cache_usage=0.96,
        preemptions=4.0,
        prompt_tokens=500.0,
        generated_tokens=600.0,
        prefix_queries=16384.0,
        prefix_hits=8192.0,
    )


def test_the_older_name_of_the_cache_usage_is_known() -> None:
    assert parse_load(PAGE.replace(b"kv_cache_usage", b"gpu_cache_usage")).kv_cache_usage == 0.96


def test_a_page_that_is_no_engines_is_refused() -> None:
    with pytest.raises(ValueError, match="no line begins with vllm:num_requests_running"):
        parse_load(b"<html>vllm:num_requests_running</html>")
    with pytest.raises(ValueError, match="could not convert"):
        parse_load(b"vllm:num_requests_running many\n")


labels = st.text(st.characters(blacklist_characters='"\\\n', blacklist_categories=["Cs"]), max_size=8)


@given(st.data(), st.lists(st.tuples(labels, st.integers(0, 999), st.integers(0, 999), st.floats(0, 1)), min_size=1, max_size=4))
def test_engines_behind_one_page_are_added_up(data: st.DataObject, engines: list[tuple[str, int, int, float]]) -> None:
    lines = [f"# HELP vllm:num_requests_running {engines[0][0]}"]
    for name, running, waiting, usage in engines:
        lines += [f'vllm:num_requests_running{{model_name="{name}"}} {running}', f'other{{a="{name}"}} 1']
        lines += [f'vllm:num_requests_waiting{{model_name="{name}"}} {waiting}']
        lines += [f'vllm:kv_cache_usage_perc{{model_name="{name}"}} {usage!r}']
    load = parse_load("\n".join(data.draw(st.permutations(lines))).encode())
    assert load.running == sum(running for _, running, _, _ in engines)
    assert load.waiting == sum(waiting for _, _, waiting, _ in engines)
    assert load.kv_cache_usage == max(usage for *_, usage in engines)


async def rounds(urls: Sequence[str], number: int, each: Callable[[], None] = lambda: None) -> list[list[EngineLoad | None]]:
    """What the watch knew after each of some rounds; `each` is called after every one."""
    watch = LoadWatch([Replica(url) for url in urls], interval_s=0.01)
    seen: list[list[EngineLoad | None]] = []
    enough = asyncio.Event()

    def changed() -> None:
        seen.append(watch.loads)
        each()
        if len(seen) == number:
            enough.set()

    watching = asyncio.create_task(watch.watch(changed))
    async with asyncio.timeout(30):
        await enough.wait()
    watching.cancel()
    await asyncio.wait([watching])
    return seen[:number]


async def test_every_replica_is_asked_in_each_round() -> None:
    async with ScriptedEngine() as first, ScriptedEngine(load={"vllm:num_requests_waiting": 5.0}) as second:

        def busier() -> None:
            first.load["vllm:num_requests_running"] = first.load.get("vllm:num_requests_running", 0.0) + 7.0

        seen = await rounds([first.url, second.url], 3, busier)
    assert seen == [[EngineLoad(running=7.0 * n), EngineLoad(waiting=5.0)] for n in range(3)]


async def test_an_engine_that_does_not_tell_is_said_once_and_known_when_it_tells_again(caplog: pytest.LogCaptureFixture) -> None:
    faults = [Fault(500, path="/metrics"), Fault(404, path="/metrics")]
    async with ScriptedEngine(faults=faults) as engine:
        with caplog.at_level(logging.WARNING):
            seen = await rounds([engine.url], 5)
    assert seen == [[None], [None], [EngineLoad()], [EngineLoad()], [EngineLoad()]]
    (said,) = [record.message for record in caplog.records if "tells no load" in record.message]
    assert "HTTP 500" in said


async def test_an_engine_that_cannot_be_reached_is_survived() -> None:
    assert await rounds(["http://127.0.0.1:1"], 2) == [[None], [None]]
