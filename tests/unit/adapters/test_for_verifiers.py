"""Our environments as another framework plays them, without that framework: episodes, their rewards, and how they fail."""

import asyncio
import json
import re
import sys
import threading
import time
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import faulty_envs
from support.faulty_envs import Faulty
from support.musique_rows import bridge_row
from turnwise.adapters.for_verifiers import api, load_environment
from turnwise.adapters.for_verifiers.episode import Called, EnvFailure, EnvOutage, Episode, openai_messages
from turnwise.adapters.for_verifiers.off_loop import Hung, off_loop
from turnwise.adapters.for_verifiers.source import Source
from turnwise.config import RewardConfig

ECHO = "support.rollouts:Echo"
FAULTY = "support.faulty_envs:Faulty"
DENSE = RewardConfig()


@pytest.fixture(autouse=True)
def faults():
    Faulty.broken = Faulty.closed = 0
    faulty_envs.release.clear()
    yield
    faulty_envs.release.set()


def source_of(env: str = ECHO, *, reward: RewardConfig = DENSE, timeout_s: float = 5.0, **args: Any) -> Source:
    return Source(env, args, reward=reward, timeout_s=timeout_s)


def episode_of(source: Source, seed: int = 1) -> Episode:
    return Episode(source, source.tasks("train")[0], seed=seed)


def musique(**args: Any) -> Source:
    return source_of("musique", train=[bridge_row()], validation=[bridge_row()], **args)


# episodes


async def test_an_episode_opens_answers_and_pays_until_it_ends():
    episode = episode_of(source_of())
    assert await episode.begin() == [{"role": "user", "content": "task train-0"}]
    assert await episode.reply("ab") == ([{"role": "user", "content": "you said ab"}], 0.02)
    messages, reward = await episode.reply("z")
    assert (messages, reward) == ([{"role": "user", "content": "won"}], 1.01)
    assert (episode.stop, episode.turns, episode.metrics) == ("terminated", 2, {"turns_seen": 2.0})
    assert episode.components == pytest.approx({"length": 0.03, "win": 1.0})
    assert (episode.reward, episode.reward_sparse) == (pytest.approx(1.03), 1.0)


async def test_sparse_reward_pays_the_outcome_and_both_totals_are_known():
    episode = episode_of(source_of(reward=RewardConfig(mode="sparse", weights={"win": 2.0})))
    await episode.begin()
    await episode.reply("abz")
    assert (episode.reward, episode.reward_dense, episode.reward_sparse) == (2.0, 2.03, 2.0)


async def test_an_episode_cut_off_from_outside_is_paid_what_it_is_owed():
    episode = episode_of(source_of(turns=9))
    await episode.begin()
    await episode.reply("ab")
    assert await episode.finish("max_turns") == -0.25
    assert episode.reward == pytest.approx(0.02 - 0.25)


async def test_an_episode_cut_off_before_its_first_reply_is_an_error():
    episode = episode_of(source_of())
    await episode.begin()
    with pytest.raises(EnvFailure, match="cut off by context_full before the first reply"):
        await episode.finish("context_full")


async def test_calls_reach_the_tools_and_each_is_answered_under_the_id_that_it_came_with():
    episode = episode_of(musique())
    await episode.begin()
    calls = [Called("x", "search", '{"query": "bridge"}'), Called("x", "search", '{"query": '), Called("y", "fetch", "[1]")]
    messages, _ = await episode.reply("", calls)
    assert [(m["role"], m["tool_call_id"]) for m in messages] == [("tool", "x"), ("tool", "x"), ("tool", "y")]
    assert "Tolvar Bridge" in messages[0]["content"]
    assert "cannot be read as JSON" in messages[1]["content"]
    assert "must be a JSON object, not list" in messages[2]["content"]
    assert (episode.metrics["calls"], episode.metrics["malformed_calls"]) == (3.0, 2.0)


async def test_calls_to_an_environment_without_tools_are_only_words():
    episode = episode_of(source_of())
    await episode.begin()
    messages, _ = await episode.reply("ab", [Called("x", "search", "{}")])
    assert messages == [{"role": "user", "content": "you said ab"}]


@given(st.text(max_size=30))
@settings(deadline=None, max_examples=30)
def test_arguments_of_any_text_make_an_answer_and_no_exception(arguments: str):
    async def play() -> str:
        episode = episode_of(musique())
        await episode.begin()
        messages, _ = await episode.reply("", [Called("x", "search", arguments)])
        return messages[0]["content"]

    assert asyncio.run(play())


@pytest.mark.parametrize(
    ("where", "what", "words"),
    [
        ("reset", "raise", "reset of .* raised, turn 0: ZeroDivisionError: planted"),
        ("reset", "none", "reset returned None"),
        ("step", "raise", "step of .* raised, turn 0: ZeroDivisionError: planted"),
        ("step", "exit", "RuntimeError: SystemExit: 3"),
        ("step", "stop_iteration", "StopIteration"),
        ("step", "none", "step returned None"),
        ("step", "number", "the observation 17, not text"),
        ("step", "nan_reward", "the reward nan, not a finite number"),
        ("step", "nan_component", r"reward_components\['known'\] is nan"),
        ("step", "unknown_component", "unknown name 'bonus'"),
        ("step", "text_component", r"reward_components\['known'\] is '1'"),
        ("step", "bad_metrics", r"metrics\['m'\] is None"),
        ("finish", "raise", "finish of .* raised, turn 1: ZeroDivisionError: planted"),
    ],
)
async def test_an_environment_that_breaks_its_contract_is_said_to_and_closed(where: str, what: str, words: str):
    source = source_of(FAULTY, where=where, what=what)
    episode = episode_of(source)

    async def play() -> None:
        await episode.begin()
        await episode.reply("a")
        await episode.finish("max_turns")

    with pytest.raises(EnvFailure, match=words):
        await play()
    await episode.close()
    assert Faulty.closed == 1


async def test_a_reward_beyond_all_numbers_is_an_error():
    episode = episode_of(source_of(FAULTY, what="huge", reward=RewardConfig(weights={"known": 10.0})))
    await episode.begin()
    with pytest.raises(EnvFailure, match="is not finite"):
        await episode.reply("a")


async def test_an_observation_beyond_the_bound_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("turnwise.adapters.answers.MAX_CHARACTERS", 20)
    episode = episode_of(source_of())
    await episode.begin()
    with pytest.raises(EnvFailure, match="the observation has 31 characters"):
        await episode.reply("a" * 22)


async def test_an_outage_is_told_apart_from_a_failure():
    episode = episode_of(source_of(FAULTY, what="outage"))
    await episode.begin()
    with pytest.raises(EnvOutage, match="no engine answers"):
        await episode.reply("a")


async def test_an_environment_that_hangs_is_left_alone():
    source = source_of(FAULTY, what="hang", timeout_s=0.05)
    episode = episode_of(source)
    await episode.begin()
    with pytest.raises(EnvFailure, match=re.escape("hung, turn 0: no answer within 0.05 s (timeout_s)")):
        await episode.reply("a")
    await episode.close()
    assert Faulty.closed == 0  # its thread is still inside


async def test_a_cancelled_episode_closes_its_environment_after_the_call_inside_and_waits_for_neither():
    episode = episode_of(source_of(FAULTY, what="hang"))
    await episode.begin()
    call = asyncio.create_task(episode.reply("a"))
    await asyncio.sleep(0)
    while not Faulty.broken:
        await asyncio.to_thread(time.sleep, 0.001)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await episode.close()
    assert Faulty.closed == 0
    faulty_envs.release.set()
    (closer,) = [thread for thread in threading.enumerate() if thread.name == "turnwise-env-close"]
    await asyncio.to_thread(closer.join, 10)
    assert Faulty.closed == 1


async def test_an_environment_that_does_not_close_in_time_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("turnwise.adapters.for_verifiers.episode.CLOSE_TIMEOUT_S", 0.01)
    monkeypatch.setattr(Faulty, "close", lambda env: faulty_envs.release.wait(10))
    episode = episode_of(source_of(FAULTY, where="nowhere"))
    await episode.begin()
    await episode.close()
    assert "closing support.faulty_envs:Faulty: no answer within 0.01 s" in caplog.text


async def test_instances_are_used_again_one_episode_at_a_time_and_never_after_a_failure():
    source = source_of()
    first, second = episode_of(source), episode_of(source)
    await first.begin()
    await second.begin()
    assert first._env is not second._env
    used = first._env
    await first.close()
    third = episode_of(source)
    await third.begin()
    assert third._env is used
    with pytest.raises(EnvFailure):
        await third.reply(17)  # type: ignore[arg-type]
    await third.close()
    fourth = episode_of(source)
    await fourth.begin()
    assert fourth._env is not used


async def test_what_a_closing_environment_raises_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def broken(env: Faulty) -> None:
        raise OSError("planted")

    monkeypatch.setattr(Faulty, "close", broken)
    episode = episode_of(source_of(FAULTY, where="nowhere"))
    await episode.begin()
    await episode.close()
    assert "closing support.faulty_envs:Faulty failed: OSError: planted" in caplog.text


# calls off the event loop


async def test_blocking_calls_leave_the_event_loop_free():
    entered, free = threading.Event(), threading.Event()

    def blocking() -> str:
        entered.set()
        free.wait(10)
        return threading.current_thread().name

    call = asyncio.create_task(off_loop(blocking, timeout_s=10))
    assert await asyncio.to_thread(entered.wait, 10)  # which the loop hears of while the call is inside
    free.set()
    assert await call == "turnwise-env"


async def test_a_call_that_itself_times_out_is_not_taken_for_one_that_hangs():
    def times_out() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await off_loop(times_out, timeout_s=5)
    with pytest.raises(Hung, match=re.escape("no answer within 0.01 s")):
        await off_loop(lambda: time.sleep(0.1), timeout_s=0.01)


# the environment as a whole


def test_every_component_has_a_weight_and_those_that_do_not_pay_have_none():
    weights = {"win": 2.0, "length": 0.5}
    assert source_of(reward=RewardConfig(weights=weights)).weights() == {"length": 0.5, "owed": 1.0, "win": 2.0}
    sparse = RewardConfig(mode="sparse", weights=weights)
    assert source_of(reward=sparse).weights() == {"length": 0.0, "owed": 0.0, "win": 2.0}


def test_weights_of_components_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="names 'speed'; its components are length, owed, win"):
        source_of(reward=RewardConfig(weights={"speed": 1.0}))


def test_a_turn_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="max_turns = 0 must be at least 1"):
        Source(ECHO, {}, reward=DENSE, max_turns=0)


def test_the_seed_of_an_episode_depends_on_seed_split_and_task_and_on_nothing_else():
    source, other = source_of(), Source(ECHO, {}, reward=DENSE, seed=1)
    seeds = [source.seed_of("train", "a"), source.seed_of("train", "b"), source.seed_of("test", "a"), other.seed_of("train", "a")]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert source_of().seed_of("train", "a") == seeds[0]


def test_a_row_made_with_other_arguments_is_refused():
    source = source_of(tasks=3)
    assert source.task("train", 2, "train-2")["id"] == "train-2"
    with pytest.raises(ValueError, match=r"task 2 of .* is 'train-2', but the row was made for 'train-7'"):
        source.task("train", 2, "train-7")
    with pytest.raises(ValueError, match=r"task 7 of .* is None"):
        source.task("train", 7, "train-7")


def test_a_split_without_tasks_is_refused():
    with pytest.raises(ValueError, match="has no task in its split 'train'"):
        source_of(tasks=0).tasks("train")


def test_containers_are_opened_once_handed_to_instances_and_closed(monkeypatch: pytest.MonkeyPatch):
    from contextlib import contextmanager

    events: list[object] = []

    @contextmanager
    def containers_of(config: Any):
        events.append(("open", config.containers.wait_s, config.orchestrator.env[0].id))
        yield "pools"
        events.append("close")

    monkeypatch.setattr("turnwise.adapters.for_verifiers.source.containers_of", containers_of)
    source = Source("support.odd_envs:Boxed", {}, reward=DENSE, timeout_s=5, containers={"wait_s": 7.0})
    assert source.reset_timeout_s == 12.0
    assert [source.take().containers, source.take().containers] == ["pools", "pools"]
    source.close()
    assert events == [("open", 7.0, "support.odd_envs:Boxed"), "close"]
    assert source_of().take().containers is None


def test_messages_for_the_api_have_arguments_as_text_and_no_other_keys():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": "ä"}}, "raw": "x", "error": "y"}
    told = [
        {"role": "assistant", "content": "", "tool_calls": [call], "raw": "all"},
        {"role": "tool", "content": "t", "tool_call_id": "c"},
    ]
    first, second = openai_messages(told)
    assert set(first) == {"role", "content", "tool_calls"}
    assert first["tool_calls"] == [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "ä"}'}}]
    assert second == told[1]
    assert json.loads(first["tool_calls"][0]["function"]["arguments"]) == {"a": "ä"}


# which API


def _install(monkeypatch: pytest.MonkeyPatch, *submodules: str) -> None:
    package = ModuleType("verifiers")
    monkeypatch.setitem(sys.modules, "verifiers", package)
    found = {f"verifiers.{name}" for name in submodules}
    monkeypatch.setattr("turnwise.adapters.for_verifiers.find_spec", lambda name: object() if name in found else None)


@pytest.mark.parametrize(
    ("submodules", "expected"), [(("legacy", "v1"), "legacy"), (("v1",), "v1"), ((), "legacy"), (("v1", "legacy"), "legacy")]
)
def test_the_api_is_chosen_by_what_is_installed(monkeypatch: pytest.MonkeyPatch, submodules: tuple[str, ...], expected: str):
    _install(monkeypatch, *submodules)
    assert api() == expected


def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'turnwise[verifiers]'")):
        load_environment("wordle")
