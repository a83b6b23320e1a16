"""Environments of verifiers 0.4 played with a scripted player: their episode, their scores, our records."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verifiers.v1", reason="needs turnwise[verifiers]")

from support.adapted_rollout import assert_trained_on_what_was_sampled, played
from turnwise.adapters.verifiers import Verifiers
from turnwise.envs import make
from turnwise.envs.checks import checked_opening, checked_step
from turnwise.envs.messages import AssistantMessage, ToolCall

pytestmark = [
    pytest.mark.verifiers,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(version("verifiers").startswith("0.3"), reason="needs verifiers 0.4"),
]
PACKAGES = Path(__file__).parents[1] / "support" / "verifiers_packages"


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PACKAGES))
    monkeypatch.setenv("PYTHONPATH", str(PACKAGES))  # of the processes that serve tools


def made(source: str = "taskset-plain", *, adapter: dict[str, Any] | None = None, **args: Any) -> Verifiers:
    env = make(f"verifiers:{source}", {"adapter": {"timeout_s": 30, **(adapter or {})}, **args})
    assert isinstance(env, Verifiers)
    return env


def begin(env: Verifiers, split: str = "train", index: int = 0):
    return env.reset(seed=0, options={"task": env.tasks(split)[index]})


def test_a_plain_taskset_is_scored_by_each_weighted_reward_and_metrics_come_beside():
    env = made(system="unused")
    opening = checked_opening(begin(env, index=1))
    assert opening == [{"role": "system", "content": "unused"}, {"role": "user", "content": "Say 2."}]
    observation, reward, terminated, truncated, info = env.step("2")
    assert (observation, reward, terminated, truncated) == ("", 1.25, True, False)
    assert info["reward_components"] == {"exact": 1.0, "short": 0.25}
    assert info["metrics"] == {"exact": 1.0, "short": 1.0, "words": 1.0}
    assert env.component_names == env.outcome_components == {"exact", "short", "other"}


def test_several_turns_go_on_until_the_environment_ends_them():
    env = made("taskset-cases")
    begin(env, index=2)
    answer = env.step("1")
    assert checked_step(answer, env.component_names).messages == [{"role": "user", "content": "higher"}]
    assert env.step("3")[1:4] == (1.25, True, False)


def test_a_stop_condition_ends_the_episode():
    env = made("taskset-cases")
    begin(env, index=2)
    env.step("give up")
    assert env.over


def test_a_rollout_that_uses_up_its_turns_is_truncated_and_scored():
    env = made("taskset-cases")
    assert env.max_turns == 3
    begin(env)
    answers = [env.step("9999") for _ in range(3)]
    assert [answer[2:4] for answer in answers] == [(False, False), (False, False), (False, True)]
    assert answers[-1][4]["reward_components"] == {"exact": 0.0, "short": 0.0}


@pytest.mark.parametrize("source", ["taskset-cases", "taskset-plain"])
def test_an_episode_cut_off_from_outside_is_scored_for_what_is_there(source: str):
    env = made(source)
    begin(env, index=2)
    if source == "taskset-cases":
        env.step("9")
    assert env.finish("context_full") == {"exact": 0.0, "short": 0.25}
    assert "words" in env.episode_metrics()


def test_tools_of_a_server_are_offered_called_and_answered():
    env = made("taskset-tools")
    assert [tool.name for tool in env.tools] == ["add"]
    assert env.tools[0].parameters["properties"].keys() == {"a", "b"}
    begin(env)
    calls = (
        ToolCall(id="call00000", name="add", arguments={"a": 2, "b": 3}),
        ToolCall(id="call00001", name="ad", raw='{"a"', error="cut short"),
    )
    result = checked_step(env.step(AssistantMessage(content="", tool_calls=calls).to_action()), env.component_names, calls)
    assert result.messages[0] == {"role": "tool", "tool_call_id": "call00000", "name": "add", "content": "5"}
    assert "not JSON" in result.messages[1]["content"]
    assert env.step(AssistantMessage(content="5").to_action())[1:4] == (1.0, True, False)


def test_tasks_have_stable_ids_and_are_held_out_by_count_or_by_arguments():
    with pytest.raises(ValueError, match=r"no validation tasks.*adapter\.validation"):
        made().tasks("validation")
    env = made(adapter={"validation": 1})
    assert [row["id"] for row in env.tasks("validation")] == ["train/3"]
    assert len(env.tasks("train")) == 3
    other = made(adapter={"validation": {"first": 7, "count": 2}})
    assert [row["id"] for row in other.tasks("validation")] == ["validation/0", "validation/1"]
    assert begin(other, "validation", 1)[0] == "Say 8."


@pytest.mark.parametrize(("fault", "words"), [("raise", "no words"), ("none", "NoneType"), ("nan", "score exact.*nan")])
def test_a_reward_that_is_no_number_ends_the_rollout_instead_of_counting_as_zero(fault: str, words: str):
    env = made(fault=fault)
    begin(env)
    with pytest.raises((RuntimeError, ValueError), match=words):
        env.step("1")


@pytest.mark.parametrize(("fault", "words"), [("env", "the board"), ("twice", "second conversation")])
def test_what_goes_wrong_between_turns_is_an_error_with_its_words(fault: str, words: str):
    env = made("taskset-cases", fault=fault)
    begin(env, index=2)
    with pytest.raises(RuntimeError, match=words):
        env.step("9")


def test_parallel_runs_of_the_policy_are_refused():
    env = made("taskset-cases", fault="parallel", adapter={"env": {"max_concurrent_agents": 2}})
    begin(env)
    with pytest.raises(RuntimeError, match="parallel completions"):
        env.step("1")


def test_an_episode_that_hangs_is_given_up_after_the_time_limit():
    env = made("taskset-cases", fault="hang", adapter={"timeout_s": 1})
    begin(env, index=2)
    with pytest.raises(TimeoutError, match="within 1 s"):
        env.step("1")


def test_a_seat_beside_the_policy_needs_an_endpoint_of_its_own():
    with pytest.raises(ValueError, match=r"seats assistant, user.*args\.adapter\.env"):
        made(adapter={"env": {"id": "user-sim"}})


def test_a_judge_needs_a_model_that_the_user_gives():
    judged = {"task": {"judges": [{"id": "reference"}]}}
    with pytest.raises(ValueError, match=r"args\.adapter\.judge"):
        made(**judged)
    env = made(**judged, adapter={"judge": {"base_url": "http://127.0.0.1:9/v1", "model": "some"}})
    (judge,) = env.backend.config.taskset.task.judges  # type: ignore[attr-defined]
    assert (judge.model, judge.base_url) == ("some", "http://127.0.0.1:9/v1")


def test_a_package_of_the_older_api_is_told_where_it_belongs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "older_package.py").write_text("def load_environment():\n    return None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="verifiers-legacy"):
        made("older-package")


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"verifiers:no-such-package cannot be loaded.*not found"):
        made("no-such-package")


async def test_a_rollout_keeps_the_tokens_that_were_sampled_and_trains_on_those_alone(tiny_model: Path):
    rollout, samples = await played("verifiers:taskset-cases", {}, ["1", "3"], model=tiny_model, index=2)
    assert_trained_on_what_was_sampled(rollout, samples)


async def test_a_failure_of_the_environment_is_an_errored_rollout_with_its_words(tiny_model: Path):
    rollout, _ = await played("verifiers:taskset-cases", {"fault": "env"}, ["1", "3"], model=tiny_model, index=2)
    assert rollout.error is not None
    assert "the board" in rollout.error
    assert len(rollout.turns) == 1
