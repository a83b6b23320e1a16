"""A loop of somebody else's, met halfway: what it asks for, what it is told, how it ends. The loops are ours, of a few lines."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from turnwise.adapters.verifiers import env as adapter
from turnwise.adapters.verifiers.env import Verifiers
from turnwise.adapters.verifiers.exchange import CutOff, Exchange, Outcome, Unsupported
from turnwise.adapters.verifiers.rows import Rows
from turnwise.envs.base import Task
from turnwise.envs.checks import checked_opening, checked_step
from turnwise.envs.messages import AssistantMessage, Tool, ToolCall

ADD = Tool(name="add", description="Add.", parameters={"type": "object", "properties": {}})
OPENING: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say 1."}]

Loop = Callable[[Exchange], Awaitable[Outcome]]


class Played:
    """A backend whose environment is one coroutine."""

    max_turns: int | None = None
    component_names = frozenset({"exact"})

    def __init__(self, loop: Loop, tools: tuple[Tool, ...] = ()) -> None:
        self.loop, self.tools = loop, tools

    def tasks(self, split: str) -> Sequence[Task]:
        return Rows(split, range(3))

    async def play(self, task: Task, exchange: Exchange) -> Outcome:
        return await self.loop(exchange)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verifiers]:
    def make(loop: Loop, *, tools: tuple[Tool, ...] = (), max_turns: int | None = None, timeout_s: float = 5.0) -> Verifiers:
        backend = Played(loop, tools)
        backend.max_turns = max_turns
        monkeypatch.setattr(adapter, "load", lambda source, args, settings: backend)
        return Verifiers(source="theirs", adapter={"timeout_s": timeout_s})

    return make


def scored(said: AssistantMessage, *, truncated: bool = False) -> Outcome:
    return Outcome({"exact": float(said.content == "1")}, {"words": 1.0}, truncated)


async def once(exchange: Exchange) -> Outcome:
    return scored(await exchange.reply(OPENING, ()))


async def twice(exchange: Exchange) -> Outcome:
    said = await exchange.reply(OPENING, ())
    history = [*OPENING, {"role": "assistant", "content": said.content}, {"role": "user", "content": "again"}]
    try:
        return scored(await exchange.reply(history, ()))
    except CutOff:
        return scored(said, truncated=True)


def test_the_opening_conversation_is_the_loops_own(made: Callable[..., Verifiers]):
    answer = made(once).reset(seed=0)
    assert checked_opening(answer) == OPENING
    assert answer[0] == "Say 1."


def test_the_last_reply_ends_the_episode_with_its_score(made: Callable[..., Verifiers]):
    env = made(once)
    env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step("1")
    assert (observation, reward, terminated, truncated) == ("", 1.0, True, False)
    assert info == {"reward_components": {"exact": 1.0}, "metrics": {"words": 1.0}, "messages": []}


def test_only_what_is_new_answers_a_reply(made: Callable[..., Verifiers]):
    env = made(twice)
    env.reset(seed=0)
    assert checked_step(env.step("0"), env.component_names).messages == [{"role": "user", "content": "again"}]
    assert env.step("1")[1:4] == (1.0, True, False)


def test_the_limit_of_turns_lets_the_loop_score_what_is_there(made: Callable[..., Verifiers]):
    env = made(twice, max_turns=1)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step("1")
    assert (reward, terminated, truncated, info["metrics"]) == (1.0, False, True, {"words": 1.0})


def test_finish_pays_what_the_loop_scores_and_only_once(made: Callable[..., Verifiers]):
    env = made(twice)
    env.reset(seed=0)
    env.step("1")
    assert env.finish("context_full") == {"exact": 1.0}
    assert env.finish("context_full") == {}


def test_calls_are_handed_over_and_tool_messages_carry_the_name_of_their_call(made: Callable[..., Verifiers]):
    seen: list[AssistantMessage] = []

    async def with_tools(exchange: Exchange) -> Outcome:
        seen.append(await exchange.reply(OPENING, (ADD,)))
        call = {"id": "call00000", "name": "add", "arguments": '{"b": 2,"a":1}'}  # the same in another spelling
        history = [*OPENING, {"role": "assistant", "content": None, "tool_calls": [call]}]
        return scored(await exchange.reply([*history, {"role": "tool", "tool_call_id": "call00000", "content": "3"}], (ADD,)))

    env = made(with_tools, tools=(ADD,))
    env.reset(seed=0)
    calls = (ToolCall(id="call00000", name="add", arguments={"a": 1, "b": 2}),)
    result = checked_step(env.step(AssistantMessage(content="", tool_calls=calls).to_action()), env.component_names, calls)
    assert result.messages == [{"role": "tool", "tool_call_id": "call00000", "name": "add", "content": "3"}]
    assert seen[0].tool_calls == calls
    assert env.step(AssistantMessage(content="1").to_action())[1] == 1.0


async def rewrites(exchange: Exchange) -> Outcome:
    await exchange.reply(OPENING, ())
    return scored(await exchange.reply([{"role": "user", "content": "forget it"}] * 4, ()))


async def edits_the_reply(exchange: Exchange) -> Outcome:
    said = await exchange.reply(OPENING, ())
    edited = {"role": "assistant", "content": said.content.upper()}
    return scored(await exchange.reply([*OPENING, edited, {"role": "user", "content": "go on"}], ()))


async def repeats(exchange: Exchange) -> Outcome:
    said = await exchange.reply(OPENING, ())
    return scored(await exchange.reply([*OPENING, {"role": "assistant", "content": said.content}], ()))


async def begins_another(exchange: Exchange) -> Outcome:
    await exchange.reply(OPENING, (), conversation="a")
    return scored(await exchange.reply(OPENING, (), conversation="b"))


async def offers_more(exchange: Exchange) -> Outcome:
    said = await exchange.reply(OPENING, ())
    history = [*OPENING, {"role": "assistant", "content": said.content}, {"role": "user", "content": "go on"}]
    return scored(await exchange.reply(history, (ADD,)))


async def speaks_as_system(exchange: Exchange) -> Outcome:
    said = await exchange.reply(OPENING, ())
    history = [*OPENING, {"role": "assistant", "content": said.content}, {"role": "system", "content": "obey"}]
    return scored(await exchange.reply(history, ()))


async def writes_a_book(exchange: Exchange) -> Outcome:
    said = await exchange.reply(OPENING, ())
    history = [*OPENING, {"role": "assistant", "content": said.content}, {"role": "user", "content": "x" * (2**20 + 1)}]
    return scored(await exchange.reply(history, ()))


async def raises(exchange: Exchange) -> Outcome:
    await exchange.reply(OPENING, ())
    raise KeyError("the board")


async def swallows(exchange: Exchange) -> Outcome:
    said = await exchange.reply(OPENING, ())
    try:
        await exchange.reply(OPENING, ())
    except Unsupported:
        return scored(said)
    raise AssertionError("it was refused")


@pytest.mark.parametrize(
    ("loop", "words"),
    [
        (rewrites, "rewrites its history: message 0 was 'system: Be brief.'"),
        (edits_the_reply, "rewrites its history: message 2 was 'assistant: a' and is now 'assistant: A'"),
        (repeats, "asks again with 3 messages after 3"),
        (begins_another, "second conversation"),
        (offers_more, "offers the tools add; the environment was loaded with none"),
        (speaks_as_system, "a message of the system"),
        (writes_a_book, "1048577 characters"),
        (raises, "the board"),
        (swallows, "asks again with 2 messages after 3|rewrites"),
    ],
)
def test_what_cannot_be_trained_on_ends_the_rollout_with_its_words(made: Callable[..., Verifiers], loop: Loop, words: str):
    env = made(loop)
    env.reset(seed=0)
    with pytest.raises(Exception, match=words):
        env.step("a")


def test_two_requests_at_a_time_are_refused(made: Callable[..., Verifiers]):
    async def parallel(exchange: Exchange) -> Outcome:
        first, _ = await asyncio.gather(exchange.reply(OPENING, ()), exchange.reply(OPENING, ()))
        return scored(first)

    env = made(parallel)
    env.reset(seed=0)
    with pytest.raises(Unsupported, match="parallel completions"):
        env.step("1")


def test_a_loop_that_neither_asks_nor_ends_is_dropped_after_the_time_limit(made: Callable[..., Verifiers]):
    dropped: list[bool] = []

    async def hangs(exchange: Exchange) -> Outcome:
        try:
            await asyncio.Event().wait()
        finally:
            dropped.append(True)
        raise AssertionError("never")

    env = made(hangs, timeout_s=0.05)
    with pytest.raises(TimeoutError, match=r"verifiers:theirs neither asked for a reply nor ended within 0\.05 s"):
        env.reset(seed=0)
    env._loop().submit(asyncio.sleep(0)).result(5)
    assert dropped == [True]


def test_a_loop_that_goes_on_after_it_was_cut_off_is_an_error(made: Callable[..., Verifiers]):
    async def stubborn(exchange: Exchange) -> Outcome:
        while True:
            try:
                await exchange.reply(OPENING, ())
            except CutOff:
                raise RuntimeError("what now?") from None

    env = made(stubborn)
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match="what now"):
        env.finish("shutdown")


def test_an_episode_without_a_request_is_an_error(made: Callable[..., Verifiers]):
    async def nothing(exchange: Exchange) -> Outcome:
        return Outcome({}, {})

    env = made(nothing)
    with pytest.raises(RuntimeError, match="ended task 'train/0' before it asked"):
        env.reset(options={"task": env.tasks("train")[0]})


def test_closing_drops_the_rollout_and_a_new_episode_begins_afresh(made: Callable[..., Verifiers]):
    env = made(twice)
    env.reset(seed=0)
    first = env._exchange
    assert first is not None
    env.reset(seed=0)
    assert env._exchange is not first
    assert env.step("0")[2:4] == (False, False)
    env.close()
    env.close()


def test_a_loop_that_is_blocked_is_left_to_itself(made: Callable[..., Verifiers], monkeypatch: pytest.MonkeyPatch):
    env = made(once)
    env.reset(seed=0)
    before = env._loop()
    monkeypatch.setattr(type(before), "stuck", property(lambda self: self is before))
    assert env.reset(seed=0)[0] == "Say 1."
    assert env._loop() is not before


def test_arguments_of_ours_are_checked():
    with pytest.raises(ValueError, match="judges"):
        Verifiers(source="theirs", adapter={"judges": {}})
