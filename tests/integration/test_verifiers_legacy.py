"""Environments of verifiers 0.3 played with a scripted player: their loop, their rubric, our records."""

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verifiers.legacy", reason="needs turnwise[verifiers-legacy]")

from support.adapted_rollout import assert_trained_on_what_was_sampled, played
from turnwise.adapters.verifiers import Verifiers
from turnwise.envs import make
from turnwise.envs.checks import checked_opening, checked_step
from turnwise.envs.messages import AssistantMessage, ToolCall

pytestmark = [pytest.mark.verifiers, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "support" / "verifiers_packages"))


def made(kind: str, *, adapter: dict[str, Any] | None = None, **args: Any) -> Verifiers:
    env = make("verifiers:classic-cases", {"kind": kind, "adapter": {"timeout_s": 20, **(adapter or {})}, **args})
    assert isinstance(env, Verifiers)
    return env


def begin(env: Verifiers, split: str = "train", index: int = 0):
    return env.reset(seed=0, options={"task": env.tasks(split)[index]})


def test_a_single_turn_is_scored_by_each_weighted_function_and_metrics_come_beside():
    env = made("once")
    _, info = begin(env, index=1)
    assert info["messages"] == [{"role": "user", "content": "Say 2."}]
    observation, reward, terminated, truncated, info = env.step("2")
    assert (observation, reward, terminated, truncated) == ("", 1.25, True, False)
    assert info["reward_components"] == {"exact": 1.0, "short": 0.25}
    assert info["metrics"] == {"exact": 1.0, "short": 1.0, "words": 1.0, "num_turns": 1.0}
    assert info["messages"] == []
    assert env.component_names == env.outcome_components == {"exact", "short"}


def test_instructions_and_worked_examples_open_the_conversation_as_the_environment_has_them():
    env = made("few", system_prompt="Be brief.")
    opening = checked_opening(begin(env))
    assert opening is not None
    assert [message["role"] for message in opening] == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in opening] == ["Be brief.", "Say 0.", "0", "Say 1."]


def test_several_turns_go_on_until_the_stop_condition():
    env = made("guess")
    begin(env, index=2)
    answer = env.step("1")
    assert checked_step(answer, env.component_names).messages == [{"role": "user", "content": "higher"}]
    assert answer[2:4] == (False, False)
    assert env.step("3")[1:4] == (1.25, True, False)


def test_a_rollout_that_uses_up_its_turns_is_truncated_and_scored():
    env = made("guess")
    begin(env)
    answers = [env.step("9999") for _ in range(3)]
    assert [answer[2:4] for answer in answers] == [(False, False), (False, False), (False, True)]
    assert answers[-1][4]["reward_components"] == {"exact": 0.0, "short": 0.0}


def test_an_episode_cut_off_from_outside_is_scored_for_what_is_there():
    env = made("guess")
    begin(env, index=2)
    env.step("9")
    assert env.finish("context_full") == {"exact": 0.0, "short": 0.25}
    assert env.episode_metrics()["num_turns"] == 1.0


def test_tools_are_offered_called_and_answered():
    env = made("tools")
    assert [tool.name for tool in env.tools] == ["add"]
    assert env.tools[0].parameters["properties"].keys() == {"a", "b"}
    begin(env, index=3)
    calls = (
        ToolCall(id="call00000", name="add", arguments={"a": 1, "b": 3}),
        ToolCall(id="call00001", raw='{"name": "add", "a', error="cut short"),
    )
    answer = env.step(AssistantMessage(content="", tool_calls=calls).to_action())
    result = checked_step(answer, env.component_names, calls)
    assert result.messages[0] == {"role": "tool", "tool_call_id": "call00000", "name": "add", "content": "4"}
    assert result.messages[1]["tool_call_id"] == "call00001"
    last = env.step(AssistantMessage(content="4").to_action())
    assert last[1:4] == (1.25, True, False)
    assert last[4]["metrics"]["add_calls"] == 1.0


def test_tasks_have_stable_ids_and_the_evaluation_set_is_held_out():
    env = made("once")
    assert [row["id"] for row in env.tasks("train")] == ["train/0", "train/1", "train/2", "train/3"]
    assert [row["id"] for row in env.tasks("validation")] == ["validation/0", "validation/1"]
    assert begin(env, "validation", 1)[0] == "Say 8."


def test_without_an_evaluation_set_tasks_are_held_out_on_request_alone():
    with pytest.raises(ValueError, match=r"no eval_dataset.*adapter\.validation"):
        made("held").tasks("validation")
    env = made("held", adapter={"validation": 1})
    assert [row["id"] for row in env.tasks("validation")] == ["train/3"]
    assert len(env.tasks("train")) == 3


@pytest.mark.parametrize(
    ("reward", "words"), [("none", "None"), ("nan", "nan"), ("text", "'0.5'"), ("raise", "ZeroDivisionError: no words")]
)
def test_a_reward_that_is_no_number_ends_the_rollout_instead_of_counting_as_zero(reward: str, words: str):
    env = made("bad", reward=reward)
    begin(env)
    with pytest.raises(RuntimeError, match=rf"bad_reward.*{words}"):
        env.step("1")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("raises", "the board"),
        ("fails", "the sandbox is gone"),
        ("rewrites", "rewrites its history: message 0"),
        ("image", "only text can be trained on"),
    ],
)
def test_what_goes_wrong_between_turns_is_an_error_with_its_words(kind: str, words: str):
    env = made(kind)
    begin(env)
    with pytest.raises(Exception, match=words):
        env.step("9")


def test_parallel_completions_are_refused():
    env = made("parallel")
    begin(env)
    with pytest.raises(RuntimeError, match="parallel completions"):
        env.step("1")


def test_a_loop_that_hangs_is_given_up_after_the_time_limit():
    env = made("hangs", adapter={"timeout_s": 0.5})
    begin(env)
    with pytest.raises(TimeoutError, match=r"within 0\.5 s"):
        env.step("9")
    env.close()
    assert begin(made("guess"))[0] == "Say 1."


def test_a_judge_needs_a_model_that_the_user_gives(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"args\.adapter\.judge"):
        made("judged")
    env = made("judged", adapter={"judge": {"base_url": "http://127.0.0.1:9/v1", "model": "some"}})
    (judge,) = (rubric for rubric in env.backend.rubrics if hasattr(rubric, "judge_model"))  # type: ignore[attr-defined]
    assert (judge.judge_model, str(judge.judge_client.base_url)) == ("some", "http://127.0.0.1:9/v1/")


def test_scores_of_a_whole_group_are_refused():
    with pytest.raises(ValueError, match="scores the rollouts of a group together"):
        made("grouped")


def test_loading_leaves_the_signals_of_the_run_alone():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    made("once", system_prompt="another, so that it is loaded anew")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"verifiers:no-such-package cannot be loaded.*installed"):
        make("verifiers:no-such-package", {})


def test_the_reasoning_gym_environment_that_comes_with_verifiers_is_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("reasoning_gym")
    package = "import verifiers as vf\n\ndef load_environment(**args):\n    return vf.ReasoningGymEnv(**args)\n"
    (tmp_path / "vf_reasoning.py").write_text(package)
    monkeypatch.syspath_prepend(str(tmp_path))
    env = make("verifiers:vf-reasoning", {"gym": "basic_arithmetic", "num_train_examples": 4, "num_eval_examples": 2})
    assert isinstance(env, Verifiers)
    theirs = env.backend.env.rg_dataset  # type: ignore[attr-defined]
    for index in range(4):
        _, info = begin(env, index=index)
        assert info["messages"][0]["role"] == "system"
        right = index % 2 == 0
        _, reward, terminated, _, info = env.step(f"<answer>{theirs[index]['answer'] if right else 'no'}</answer>")
        assert terminated
        assert (reward == 1.0) is right
        assert set(info["reward_components"]) == {"check_answer_reward_func"}
    assert "verifiers" in sys.modules


async def test_a_rollout_keeps_the_tokens_that_were_sampled_and_trains_on_those_alone(tiny_model: Path):
    rollout, samples = await played("verifiers:classic-cases", {"kind": "guess"}, ["1", "3"], model=tiny_model, index=2)
    assert_trained_on_what_was_sampled(rollout, samples)


async def test_a_failure_of_the_environment_is_an_errored_rollout_with_its_words(tiny_model: Path):
    rollout, _ = await played("verifiers:classic-cases", {"kind": "raises"}, ["1", "3"], model=tiny_model, index=2)
    assert rollout.error is not None
    assert "the board" in rollout.error
    assert len(rollout.turns) == 1
