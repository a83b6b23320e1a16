"""Environments with tools: calls and their answers, endings, what a hostile reply may do."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from turnwise.envs import Done, Step, Task, ToolEnv, ToolError, tool
from turnwise.envs.messages import AssistantMessage, ToolCall
from turnwise.envs.tool_env import MAX_ANSWER_CHARACTERS, MAX_ARGUMENT_CHARACTERS


class Vault(ToolEnv):
    """Open a vault: `hint` tells whether the code is higher, `unlock` ends the episode."""

    component_names = frozenset({"hint", "win", "invalid"})
    max_turns = 3
    max_calls = 3

    def tasks(self, split: str) -> Sequence[Task]:
        return [{"id": f"vault-{code}", "code": code} for code in range(1, 5)]

    def begin(self, task: Task) -> str:
        self.code: int = task["code"]
        return "The vault is locked."

    @tool
    def hint(self, guess: int) -> str:
        """Compare a guess with the code."""
        if guess > 1000:
            raise ToolError("the code has one digit.")
        if guess == 666:
            raise OSError("the vault is on fire")
        if guess == 777:
            return 7  # type: ignore[return-value]
        self.earn(hint=0.1)
        return "higher" if self.code > guess else "not higher"

    @tool
    def unlock(self, code: int) -> str:
        """Try the code, once."""
        if code == self.code:
            self.earn(win=1.0)
        return Done("open" if code == self.code else "alarm")

    @tool
    def shout(self, times: int) -> str:
        """Shout."""
        return "a" * times

    def invalid_call(self, call: ToolCall) -> None:
        self.earn(invalid=-0.5)


def vault(code: int = 3, env: Vault | None = None) -> Vault:
    env = env or Vault()
    env.reset(options={"task": {"id": "v", "code": code}})
    return env


def call(name: str | None, arguments: dict[str, Any] | None = None, **more: Any) -> ToolCall:
    return ToolCall(id=more.pop("id", "c1"), name=name, arguments=arguments, **more)


def say(env: ToolEnv, *calls: ToolCall, content: str = "") -> Step:
    return env.step(AssistantMessage(content=content, tool_calls=calls).to_action())


def test_calls_are_run_in_order_and_answered_one_by_one() -> None:
    observation, reward, terminated, truncated, info = say(
        vault(), call("hint", {"guess": 2}, id="a"), call("hint", {"guess": "3"}, id="b")
    )
    assert info["messages"] == [
        {"role": "tool", "tool_call_id": "a", "name": "hint", "content": "higher"},
        {"role": "tool", "tool_call_id": "b", "name": "hint", "content": "not higher"},
    ]
    assert observation == "higher\n\nnot higher"
    assert info["reward_components"] == {"hint": pytest.approx(0.2)}
    assert reward == pytest.approx(0.2)
    assert (terminated, truncated) == (False, False)
    assert info["metrics"] == {"calls": 2, "invalid_calls": 0, "malformed_calls": 0}


def test_a_tool_ends_the_episode_and_the_calls_after_it_are_not_run() -> None:
    env = vault()
    _, reward, terminated, truncated, info = say(
        env, call("hint", {"guess": 1}), call("unlock", {"code": 3}), call("hint", {"guess": 2}), call("unlock", {"code": 3})
    )
    assert [message["content"] for message in info["messages"]] == ["higher", "open", *["Not run: the episode is over."] * 2]
    assert info["reward_components"] == {"hint": 0.1, "win": 1.0}
    assert (terminated, truncated, reward) == (True, False, pytest.approx(1.1))
    assert env.finish("late") == {}
    with pytest.raises(RuntimeError, match=r"Vault\.step\(\) after the end of an episode"):
        say(env, call("hint", {"guess": 1}))


def test_each_step_earns_for_itself_alone() -> None:
    env = vault()
    assert say(env, call("hint", {"guess": 1}))[4]["reward_components"] == {"hint": 0.1}
    assert say(env, content="hm")[4]["reward_components"] == {}
    assert say(env, call("hint", {"guess": 1}))[4]["reward_components"] == {"hint": 0.1}


def test_the_last_turn_truncates_unless_a_tool_ended_the_episode_there() -> None:
    for last, over in ((call("hint", {"guess": 1}), (False, True)), (call("unlock", {"code": 1}), (True, False))):
        env = vault()
        say(env, content="one")
        say(env, content="two")
        assert say(env, last)[2:4] == over


def test_a_reply_without_calls_is_told_of_the_tools_or_ends_the_episode() -> None:
    for action in ("hello", AssistantMessage(content="hello").to_action(), '{"name": "hint"}'):
        observation, _, terminated, _, info = vault().step(action)
        assert observation == "The reply calls no tool. Call one of: hint, unlock, shout."
        assert info["messages"] == [{"role": "user", "content": observation}]
        assert not terminated
    env = Vault()
    env.ends_without_call = True
    assert say(vault(env=env), content="hello")[2]


def test_what_is_wrong_with_a_call_is_said_and_the_others_are_run() -> None:
    env = vault()
    _, _, _, _, info = say(
        env,
        call("hnit", {"guess": 1}, id="unknown"),
        call("hint", {"guess": "one"}, id="wrong"),
        call("hint", {"guess": 1}, id="right"),
    )
    unknown, wrong, right = (message["content"] for message in info["messages"])
    assert unknown == "Error: there is no tool 'hnit'. Did you mean 'hint'? Tools: hint, unlock, shout."
    assert wrong.startswith("Error: guess = 'one': Input should be a valid integer")
    assert wrong.endswith('The form is {"name": "hint", "arguments": {"guess": 1}}')
    assert right == "higher"
    assert info["reward_components"] == {"invalid": -1.0, "hint": 0.1}
    assert info["metrics"] == {"calls": 3, "invalid_calls": 2, "malformed_calls": 0}


HINT_FORM = 'The form is {"name": "hint", "arguments": {"guess": 1}}'
UNLOCK_FORM = 'The form is {"name": "unlock", "arguments": {"code": 1}}'


@pytest.mark.parametrize(
    ("broken", "answer", "malformed"),
    [
        (call(None, raw="{nonsense", error="not valid JSON"), f"Error: not valid JSON. {HINT_FORM}", 1),
        (call("unlock", raw="{", error="the call is not finished"), f"Error: the call is not finished. {UNLOCK_FORM}", 1),
        (call("unlock"), f"Error: a call needs a name and arguments. {UNLOCK_FORM}", 1),
        (call("hint", {"guess": 1}, error="one call a turn"), "Error: one call a turn.", 0),
        (call("hint", {"guess": 1001}), "Error: the code has one digit.", None),
    ],
)
def test_a_call_that_cannot_be_run_is_answered_with_the_reason(broken: ToolCall, answer: str, malformed: int | None) -> None:
    _, _, _, _, info = say(vault(), broken)
    assert info["messages"][0]["content"] == answer
    expected = (
        {"invalid_calls": 0, "malformed_calls": 0} if malformed is None else {"invalid_calls": 1, "malformed_calls": malformed}
    )
    assert info["metrics"] == {"calls": 1, **expected}


def test_a_tool_left_out_of_an_instance_cannot_be_called() -> None:
    env = vault()
    env.tools = tuple(tool for tool in env.tools if tool.name != "unlock")
    assert "there is no tool 'unlock'" in say(env, call("unlock", {"code": 3}))[0]
    env.tools = ()
    assert say(env, call(None))[0].endswith('The form is {"name": "...", "arguments": {}}')


def test_failures_of_the_environment_are_raised_not_answered() -> None:
    with pytest.raises(OSError, match="the vault is on fire"):
        say(vault(), call("hint", {"guess": 666}))
    with pytest.raises(TypeError, match=r"tool Vault\.hint returned int; it must return text"):
        say(vault(), call("hint", {"guess": 777}))


def test_more_calls_than_allowed_are_answered_but_not_run() -> None:
    _, _, _, _, info = say(vault(), *(call("hint", {"guess": 1}, id=str(i)) for i in range(5)))
    assert [message["content"] for message in info["messages"]] == ["higher"] * 3 + ["Not run: a reply may make 3 calls."] * 2
    assert info["metrics"]["calls"] == 3


def test_arguments_and_answers_have_a_greatest_length() -> None:
    assert (
        "the arguments are longer than 100,000 characters"
        in say(vault(), call("hint", {"guess": "1" * MAX_ARGUMENT_CHARACTERS}))[0]
    )
    long = say(vault(), call("shout", {"times": MAX_ANSWER_CHARACTERS + 7}))[0]
    assert long.endswith("a\n[7 characters more]")
    assert len(long) < MAX_ANSWER_CHARACTERS + 30


@pytest.mark.parametrize("depth", [50, 300, 900, 3000, 100_000])
def test_arguments_nested_without_end_are_a_wrong_call(depth: int) -> None:
    nested = (
        '{"content": "", "tool_calls": [{"id": "c1", "name": "hint", "arguments": {"guess": ' + "[" * depth + "]" * depth + "}}]}"
    )
    observation = vault().step(nested)[0]
    assert observation.startswith(("Error: ", "The reply calls no tool."))
    assert len(observation) < 1000


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
TOOL_NAMES = st.sampled_from(["hint", "unlock", "__init__", "tasks", "step", "earn"]) | st.text(max_size=8)
ARGUMENT_NAMES = st.sampled_from(["guess", "code", "self", "__class__"]) | st.text(max_size=5)
CALLS = st.builds(
    ToolCall,
    id=st.text(max_size=5),
    name=st.none() | TOOL_NAMES,
    arguments=st.none() | st.dictionaries(ARGUMENT_NAMES, VALUES, max_size=3),
    raw=st.text(max_size=10),
    error=st.none() | st.text(max_size=10),
)


@given(calls=st.lists(CALLS, max_size=5), content=st.text(max_size=20))
@settings(deadline=None)
def test_every_call_of_any_reply_gets_one_answer(calls: list[ToolCall], content: str) -> None:
    assume(all((item.arguments or {}).get("guess") not in (666, 777) for item in calls))
    message = AssistantMessage(content=content, tool_calls=tuple(calls))
    observation, _, _, _, info = vault().step(message.to_action())
    answers = info["messages"]
    assert [answer.get("tool_call_id") for answer in answers] == [item.id for item in calls] or (not calls and len(answers) == 1)
    assert observation == "\n\n".join(answer["content"] for answer in answers)
    assert (
        info["metrics"]["malformed_calls"] <= info["metrics"]["invalid_calls"] <= info["metrics"]["calls"] <= max(3, len(calls))
    )


@given(text=st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape")))
@settings(deadline=None)
def test_any_text_is_an_action(text: str) -> None:
    assert isinstance(vault().step(text)[0], str)


def test_check_env_finds_nothing_to_warn_of() -> None:
    check_env(Vault(), skip_render_check=True)


def test_counts_begin_anew_with_each_episode() -> None:
    env = vault()
    say(env, call("hnit", {}))
    vault(env=env)
    assert env.episode_metrics() == {"calls": 0, "invalid_calls": 0, "malformed_calls": 0}


def test_an_author_may_act_on_whole_replies() -> None:
    class Echo(Vault):
        def act(self, message: AssistantMessage) -> Step:
            return self.respond(message, [json.dumps(item.arguments) for item in message.tool_calls] or ["nothing"])

    class Forgetful(Vault):
        def act(self, message: AssistantMessage) -> Step:
            return self.answer("?")

    class Miscounting(Vault):
        def act(self, message: AssistantMessage) -> Step:
            return self.respond(message, ["one"])

    assert say(vault(env=Echo()), call("hint", {"guess": 1}), call("x", {}, id="c2"))[0] == '{"guess": 1}\n\n{}'
    with pytest.raises(RuntimeError, match=r"Forgetful\.act\(\) must return self\.respond"):
        say(vault(env=Forgetful()), call("hint", {}))
    with pytest.raises(ValueError, match=r"Miscounting: 1 answers to 2 calls"):
        say(vault(env=Miscounting()), call("hint", {}), call("hint", {}))


def test_a_tool_must_not_hide_a_method_of_the_environment() -> None:
    with pytest.raises(TypeError, match=r'Quiz\.answer would hide ToolEnv\.answer; .* write @tool\(name="answer"\) above it'):

        class Quiz(Vault):
            @tool
            def answer(self, text: str) -> str:  # type: ignore[override]
                """Answer."""
                return Done(text)
