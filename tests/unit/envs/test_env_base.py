"""TextEnv: its helpers, and what it refuses."""

from collections.abc import Sequence

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.envs import FreeText, Step, Task, TextEnv, make


class Echo(TextEnv):
    """Say 'stop' to win; every other word costs a tenth."""

    max_turns = 3
    component_names = frozenset({"cost", "consolation", "win", "bad"})

    def tasks(self, split: str) -> Sequence[Task]:
        return [{"id": f"{split}-{n}", "n": n} for n in range(4)] if split in ("train", "validation") else []

    def begin(self, task: Task) -> str:
        return f"task {task['n']}"

    def step(self, action: str) -> Step:
        self.turn += 1
        if action == "stop":
            return self.win("done")
        if action == "leave":
            return self.end("left")
        if action == "bad":
            return self.answer("?", components={"bad": float("nan")})
        if action == "unknown":
            return self.answer("?", components={"csot": 1.0})
        return self.answer(action, components={"cost": -0.1})

    def closing_components(self) -> dict[str, float]:
        return {"consolation": 0.05}

    def episode_metrics(self) -> dict[str, float]:
        return {"replies": float(self.turn)}


class Empty(Echo):
    """Has no tasks."""

    def tasks(self, split: str) -> Sequence[Task]:
        return []


@pytest.fixture
def env() -> Echo:
    env = Echo()
    env.reset(seed=0)
    return env


def test_a_plain_subclass_passes_check_env() -> None:
    check_env(make(f"{__name__}:Echo"))


def test_answer_goes_on_and_win_ends(env: Echo) -> None:
    assert env.step("hello") == ("hello", -0.1, False, False, {"reward_components": {"cost": -0.1}, "metrics": {"replies": 1.0}})
    assert env.step("stop") == ("done", 1.0, True, False, {"reward_components": {"win": 1.0}, "metrics": {"replies": 2.0}})


def test_the_last_turn_is_truncated_and_paid_what_is_owed(env: Echo) -> None:
    steps = [env.step("a") for _ in range(3)]
    assert [step[2:4] for step in steps] == [(False, False), (False, False), (False, True)]
    assert steps[-1][4]["reward_components"] == {"cost": -0.1, "consolation": 0.05}
    assert steps[-1][1] == pytest.approx(-0.05)


def test_rules_that_end_the_episode_in_the_last_turn_do_not_truncate_it(env: Echo) -> None:
    env.step("a")
    env.step("a")
    assert env.step("leave")[2:4] == (True, False)


def test_finish_pays_what_is_owed_once(env: Echo) -> None:
    env.step("a")
    assert env.finish("context is full") == {"consolation": 0.05}
    assert env.finish("context is full") == {}
    with pytest.raises(RuntimeError, match=r"Echo\.step\(\) after the end of an episode"):
        env.step("a")


def test_finish_after_the_end_pays_nothing(env: Echo) -> None:
    env.step("stop")
    assert env.finish("shutdown") == {}


def test_step_before_reset_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        Echo().step("a")


def test_the_given_task_is_played(env: Echo) -> None:
    observation, info = env.reset(options={"task": env.tasks("validation")[2]})
    assert (observation, info["task_id"], env.turn) == ("task 2", "validation-2", 0)


def test_without_a_task_a_training_task_is_drawn_by_the_seed(env: Echo) -> None:
    drawn = [env.reset(seed=seed)[1]["task_id"] for seed in range(20)]
    assert drawn == [env.reset(seed=seed)[1]["task_id"] for seed in range(20)]
    assert set(drawn) == {f"train-{n}" for n in range(4)}


def test_nonsense_is_refused(env: Echo) -> None:
    with pytest.raises(ValueError, match="reward component 'bad' is nan; it must be a finite number"):
        env.step("bad")
    with pytest.raises(ValueError, match=r"'csot' is not among component_names \(bad, consolation, cost, win\)"):
        env.step("unknown")
    with pytest.raises(TypeError, match=r"options\['task'\] must be a task row, not str"):
        env.reset(options={"task": "validation-2"})
    with pytest.raises(ValueError, match="Empty has no training task to draw"):
        Empty().reset()


def test_an_environment_without_rules_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        TextEnv()  # type: ignore[abstract]


@given(text=st.text(max_size=80))
@settings(deadline=None)
def test_free_text_holds_any_text_up_to_its_length(text: str) -> None:
    space = FreeText(40)
    assert (text in space) == (len(text) <= 40)


def test_free_text_holds_nothing_but_text_and_samples_itself() -> None:
    space = FreeText(8)
    assert 3 not in space
    assert b"abc" not in space
    space.seed(0)
    samples = [space.sample() for _ in range(50)]
    assert all(sample in space for sample in samples)
    assert len({len(sample) for sample in samples}) > 4
    assert repr(space) == "FreeText(8)"


def test_two_environments_share_no_space() -> None:
    assert Echo().action_space is not Echo().action_space


def test_observations_of_gymnasium_make_are_checked_as_text() -> None:
    env = gymnasium.make("turnwise/wordle")
    observation, _ = env.reset(seed=0)
    assert observation in env.observation_space
    assert "ünïcödé → 🟩" in env.action_space
