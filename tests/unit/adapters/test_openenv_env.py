"""The environment over an OpenEnv server: episodes, rewards, and everything that a server can do wrong."""

import math
import re
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env

from support.openenv_server import BREAK_OFF, HANG, fake_openenv, observed, refused
from turnwise.adapters.openenv import wire
from turnwise.adapters.openenv.env import OpenEnv
from turnwise.adapters.openenv.wire import OpenEnvError, Refused
from turnwise.envs import make
from turnwise.envs.messages import AssistantMessage, ToolCall

NUMBERS = {"type": "object", "properties": {"move": {"type": "integer"}}, "required": ["move"]}


def always(step: object, reset: object = None) -> Callable[[str, dict[str, Any]], object]:
    return lambda kind, _data: (observed("go") if reset is None else reset) if kind == "reset" else step


def step_of(answer: object, **args: Any) -> tuple[Any, ...]:
    """The first step of an episode whose server answers it with `answer`."""
    with fake_openenv(always(answer)) as fake, closing(OpenEnv(fake.url, **args)) as env:
        env.reset(seed=0)
        return env.step("hello")


def test_an_episode_is_played_with_the_seed_of_its_task_and_the_session_is_given_back():
    def play(kind: str, data: dict[str, Any]) -> object:
        return (
            observed("go", None)
            if kind == "reset"
            else observed(f"you said {data['message']}", 0.5, done=data["message"] == "bye")
        )

    with fake_openenv(play) as fake:
        env = make(f"openenv:{fake.url}", {"tasks": 4, "reset": {"level": 2}})
        task = env.tasks("train")[3]
        assert env.reset(seed=9, options={"task": task})[0] == "go"
        assert env.step("one") == (
            "you said one",
            0.5,
            False,
            False,
            {"reward_components": {"reward": 0.5}, "metrics": {"invalid_actions": 0.0}},
        )
        assert env.step("bye")[1:4] == (0.5, True, False)
        env.close()
    assert fake.sent == [
        ("reset", {"level": 2, "seed": task["seed"]}),
        ("step", {"message": "one"}),
        ("step", {"message": "bye"}),
        ("close", None),
    ]


def test_every_instance_has_a_session_of_its_own():
    with fake_openenv(always(observed("on"))) as fake:
        one, other = OpenEnv(fake.url), OpenEnv(fake.url)
        one.reset(seed=0)
        other.reset(seed=0)
        assert fake.sessions == 2
        one.close()
        other.step("still there")
        other.close()


def test_seeds_of_the_splits_are_disjoint_and_a_reset_without_a_task_draws_one():
    env = OpenEnv("http://127.0.0.1:9", tasks=5)
    seeds = {split: {row["seed"] for row in env.tasks(split)} for split in ("train", "validation")}
    assert {len(found) for found in seeds.values()} == {5}
    assert not seeds["train"] & seeds["validation"]
    with pytest.raises(ValueError, match=r"no split 'test'.* Known: train, validation"):
        env.tasks("test")


def test_instructions_of_the_server_stand_before_the_first_observation_unless_some_are_given():
    with fake_openenv(always(observed("on"), observed("go", None, system_prompt="Be brief."))) as fake:
        with closing(OpenEnv(fake.url)) as env:
            assert env.reset(seed=0)[0] == "Be brief.\n\ngo"
        with closing(OpenEnv(fake.url, system_prompt="Be long.")) as env:
            assert env.reset(seed=0)[0] == "go"


def test_components_and_metrics_are_taken_from_the_metadata():
    answer = observed("on", 3.0, done=True, parts={"win": 1.0, "style": 2.0}, facts={"acc": 1})
    step = step_of(answer, components="parts", metrics="facts", outcome=["win"])
    assert step[1] == 3.0
    assert step[4] == {"reward_components": {"win": 1.0, "style": 2.0}, "metrics": {"invalid_actions": 0.0, "acc": 1.0}}


def test_an_end_that_the_server_calls_truncated_is_truncated():
    assert step_of(observed("on", 1.0, done=True, truncated=True))[2:4] == (False, True)
    assert step_of(observed("on", 1.0, done=True))[2:4] == (True, False)


def test_true_and_false_are_rewards_as_the_protocol_has_it():
    assert step_of(observed("on", True))[1] == 1.0


@pytest.mark.parametrize(
    ("reward", "named"), [("0.5", "'0.5', not a number"), (math.nan, "is nan"), (math.inf, "inf"), ([1], "[1]")]
)
def test_a_reward_that_is_no_finite_number_is_an_error(reward: object, named: str):
    with pytest.raises(OpenEnvError, match=rf"the reward of the answer of http.* to step 1 .*{re.escape(named)}"):
        step_of(observed("on", reward))


def test_no_reward_is_nothing_earned_only_where_the_episode_has_others():
    assert step_of(observed("on", None))[1:3] == (0.0, False)
    with pytest.raises(OpenEnvError, match="reward = null, which NaN becomes too; the episode ended without any reward"):
        step_of(observed("on", None, done=True))
    with pytest.raises(OpenEnvError, match=r"every step must have one \(args.null_rewards = false\)"):
        step_of(observed("on", None), null_rewards=False)


@pytest.mark.parametrize("parts", [None, [1.0], {"win": None}, {"win": "1"}, {"win": math.nan}])
def test_components_that_are_no_numbers_are_errors(parts: object):
    with pytest.raises(OpenEnvError, match=r"metadata\.parts"):
        step_of(observed("on", 1.0, parts=parts), components="parts")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (observed("x" * 101), "an observation of 101 characters, more than args.max_observation_chars = 100"),
        ({"type": "observation", "data": {"observation": {"said": "x"}, "reward": 1.0}}, "has done = None"),
        ({"type": "observation", "data": {"observation": "x", "reward": 1.0, "done": False}}, "not an object"),
        ("not json", "answered no JSON: 'not json'"),
        ("[1]", "which is no observation of OpenEnv"),
        ({"type": "state", "data": {}}, "which is no observation of OpenEnv"),
        (refused("it broke", "EXECUTION_ERROR"), "refused with EXECUTION_ERROR: it broke"),
        (BREAK_OFF, "broke the connection off (code 1006)"),
    ],
)
def test_what_the_protocol_does_not_know_is_an_error_that_says_so(answer: object, said: str):
    with pytest.raises(OpenEnvError, match=re.escape(said)):
        step_of(answer, max_observation_chars=100)


def test_a_message_beyond_the_bound_ends_the_session(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 1000)
    with pytest.raises(OpenEnvError, match=r"failed: .*exceeds limit 1000"):
        step_of(observed("x" * 2000))


def test_a_server_that_hangs_is_left_after_its_time_and_its_session_with_it():
    with fake_openenv(always(HANG)) as fake, closing(OpenEnv(fake.url)) as env:
        env.reset(seed=0)
        assert env.session is not None
        env.session.timeout_s = 0.05
        with pytest.raises(OpenEnvError, match=r"did not answer within args.timeout_s = 0.05; the session is closed"):
            env.step("hello")
        with pytest.raises(OpenEnvError, match=r"step: the session with .* is closed; begin an episode with reset"):
            env.step("hello")  # never a second connection in the middle of an episode
        assert [kind for kind, _ in fake.sent].count("step") == 1


def test_a_reply_that_is_no_action_is_answered_and_costs_a_turn_and_no_more_than_the_price():
    error = {"loc": ["move"], "msg": "should be a whole number", "type": "int_parsing"}

    def play(kind: str, data: dict[str, Any]) -> object:
        if kind == "step" and not isinstance(data["move"], int):
            return refused("Invalid message", "VALIDATION_ERROR", errors=[error])
        return observed("go", 1.0)

    with fake_openenv(play, action=NUMBERS) as fake, closing(OpenEnv(fake.url, max_turns=2, invalid_action_cost=0.1)) as env:
        env.reset(seed=0)
        text, reward, terminated, truncated, info = env.step("up")
        assert (text, reward, terminated, truncated) == (
            "The reply is no action that the environment takes: move: should be a whole number. "
            "Reply with a whole number for move and nothing else.",
            -0.1,
            False,
            False,
        )
        assert info["metrics"] == {"invalid_actions": 1.0}
        assert env.step("3")[1:4] == (1.0, False, True)


def test_validation_that_fails_inside_the_environment_is_no_fault_of_the_reply():
    error = {"loc": ["score"], "msg": "missing", "type": "missing"}
    with pytest.raises(Refused, match="refused with VALIDATION_ERROR"):
        step_of(refused("Invalid message", "VALIDATION_ERROR", errors=[error]))


def test_an_episode_that_is_over_at_its_reset_is_an_error():
    ended = always(None, observed("go", done=True))
    with fake_openenv(ended) as fake, pytest.raises(OpenEnvError, match="ended before the first action"):
        OpenEnv(fake.url).reset(seed=0)


def test_a_full_server_is_waited_for():
    with fake_openenv(always(observed("on")), capacity=1) as fake:
        first, second = OpenEnv(fake.url), OpenEnv(fake.url, timeout_s=0.5)
        first.reset(seed=0)
        with pytest.raises(OpenEnvError, match=r"no place became free within 0.5 s. Allow more sessions .*max_concurrent_envs"):
            second.reset(seed=0)
        first.close()
        with closing(OpenEnv(fake.url)) as third:
            third.reset(seed=0)


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(OpenEnvError, match=r"no OpenEnv server can be reached at http://127\.0\.0\.1:9/schema"):
        OpenEnv("http://127.0.0.1:9").reset(seed=0)


@pytest.mark.parametrize(
    ("source", "args", "said"),
    [
        ("ftp://host", {}, "a URL begins with http://, https://, ws://, wss://"),
        ("http://", {}, "names a host"),
        ("", {}, "needs a URL, an image, or a name"),
        ("http://host", {"command": ["serve"]}, "leave args.command out"),
        ("mine", {"command": ["serve", "--port", "8000"]}, "lacks {port}"),
        ("http://host", {"timeout_s": 0}, "args.timeout_s = 0 must be above 0"),
        ("http://host", {"tasks": 0}, "must be a whole number from 1 on"),
        ("http://host", {"colour": 1}, "args.colour is not an argument of environment 'openenv:http://host'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_when_it_is_made(source: str, args: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        make(f"openenv:{source}", args)


def test_tasks_of_the_server_are_its_own_count_a_split():
    with (
        fake_openenv(always(observed("on")), tasks={"train": 3, "validation": 2}) as fake,
        closing(OpenEnv(fake.url, tasks="server")) as env,
    ):
        assert [row["id"] for row in env.tasks("train")] == ["train/0", "train/1", "train/2"]
        env.reset(seed=7, options={"task": env.tasks("validation")[1]})
    assert fake.sent[0] == ("reset", {"seed": 7, "split": "validation", "index": 1})


def test_a_server_that_counts_no_tasks_says_to_give_a_number():
    with (
        fake_openenv(always(observed("on"))) as fake,
        pytest.raises(ValueError, match=r"counts no tasks .*give a number .*501"),
    ):
        OpenEnv(fake.url, tasks="server").tasks("train")


def test_a_server_that_is_not_there_is_a_wrong_configuration_where_it_is_to_count_tasks():
    with pytest.raises(ValueError, match=r"openenv:.*no OpenEnv server can be reached"):
        OpenEnv("http://127.0.0.1:9", tasks="server").tasks("train")


def test_it_passes_the_checks_of_gymnasium():
    with fake_openenv(always(observed("on", 0.5))) as fake, closing(OpenEnv(fake.url)) as env:
        check_env(env, skip_render_check=True)


ADD = {"name": "add", "description": "Add.", "inputSchema": {"type": "object", "properties": {"one": {"type": "integer"}}}}


def with_tools(env: OpenEnv, *calls: ToolCall) -> tuple[Any, ...]:
    return env.step(AssistantMessage(content="so", tool_calls=calls).to_action())


def answered_call(reward: object = None, *, done: bool = False, **observation: Any) -> dict[str, Any]:
    return {"type": "observation", "data": {"observation": observation, "reward": reward, "done": done}}


def test_calls_of_a_reply_are_made_in_order_and_their_rewards_added():
    def play(kind: str, data: dict[str, Any]) -> object:
        if kind == "reset":
            return observed("go")
        number = data["arguments"]["one"]
        return answered_call(number, done=number == 2, result={"content": [{"type": "text", "text": f"is {number}"}]})

    with fake_openenv(play) as fake:
        fake.tools = [ADD]
        with closing(OpenEnv(fake.url, offer_tools=True, invalid_action_cost=0.5)) as env:
            assert [(one.name, one.parameters) for one in env.tools] == [("add", ADD["inputSchema"])]
            env.reset(seed=0)
            *step, info = with_tools(env)
            assert (step, info["messages"][0]["role"]) == (
                ["The reply calls no tool. Call one of: add.", -0.5, False, False],
                "user",
            )
            calls = [ToolCall(id=str(n), name="add", arguments={"one": n}) for n in (1, 2, 3)]
            broken = ToolCall(id="b", name="add", raw="add(", error="it is cut off")
            *step, info = with_tools(env, calls[0], broken, *calls[1:])
            assert step[1:] == [2.0, True, False]
            assert [(message["tool_call_id"], message["content"]) for message in info["messages"]] == [
                ("1", "is 1"),
                ("b", "Not run: it is cut off."),
                ("2", "is 2"),
                ("3", "Not run: the episode is over, or there are too many calls."),
            ]


def test_a_call_that_the_server_fails_to_make_is_an_error_and_one_that_it_refuses_an_answer():
    for kind, raised in (("invalid_args", False), ("tool_not_found", False), ("transport_error", True), ("timeout", True)):
        answer = answered_call(error={"error_type": kind, "message": "no"}, result=None)
        with fake_openenv(always(answer)) as fake:
            fake.tools = [ADD]
            with closing(OpenEnv(fake.url, offer_tools=True)) as env:
                env.reset(seed=0)
                if raised:
                    with pytest.raises(OpenEnvError, match=f"failed on the server with {kind}: no"):
                        with_tools(env, ToolCall(id="1", name="add", arguments={}))
                else:
                    assert with_tools(env, ToolCall(id="1", name="add", arguments={}))[0] == f"{kind}: no"


def test_tools_of_a_server_that_has_none_are_refused_when_it_is_made():
    with (
        fake_openenv(always(observed("on"))) as fake,
        pytest.raises(ValueError, match=r"does not support MCP\); leave args.offer_tools out"),
    ):
        OpenEnv(fake.url, offer_tools=True)
