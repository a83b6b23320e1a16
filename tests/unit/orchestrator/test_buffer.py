"""The stream of tasks."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.rollouts import ECHO, echo_setup
from turnwise.config import BufferConfig, EnvConfig
from turnwise.orchestrator.buffer import TaskBuffer, only_tasks
from turnwise.orchestrator.environments import EnvSetup, load_setups


def _buffer(kind: str = "epochs", *, seed: int = 0, tasks: int = 5) -> TaskBuffer:
    return TaskBuffer([echo_setup(args={"tasks": tasks})], BufferConfig.model_validate({"kind": kind}), seed)


@given(st.integers(1, 12), st.integers(0, 2**31), st.integers(0, 5))
@settings(deadline=None)
def test_every_epoch_has_every_task_once(tasks: int, seed: int, epoch: int):
    buffer = _buffer(seed=seed, tasks=tasks)
    drawn = [buffer.draw(group).index for group in range(epoch * tasks, (epoch + 1) * tasks)]
    assert sorted(drawn) == list(range(tasks))


def test_a_group_maps_to_the_same_task_whoever_asks_and_when():
    one, other = _buffer(seed=3), _buffer(seed=3)
    forward = [one.draw(group) for group in range(17)]
    backward = [other.draw(group) for group in reversed(range(17))]
    assert [(d.index, d.env_seed) for d in forward] == [(d.index, d.env_seed) for d in reversed(backward)]
    assert len({d.env_seed for d in forward}) == 17


def test_epochs_are_shuffled_each_in_its_own_way_and_by_the_run_seed():
    buffer, other = _buffer(tasks=20), _buffer(tasks=20, seed=1)
    first = [buffer.draw(g).index for g in range(20)]
    assert first != [buffer.draw(g).index for g in range(20, 40)]
    assert first != [other.draw(g).index for g in range(20)]
    assert first != list(range(20))


def test_the_mixture_has_the_configured_shares_in_every_stretch_of_the_stream():
    configs = [EnvConfig(id=ECHO, weight=3.0), EnvConfig(id=ECHO, weight=1.0)]
    buffer = TaskBuffer(load_setups(configs, "train"), BufferConfig(), 0)
    names = [buffer.draw(group).env.name for group in range(400)]
    assert set(names) == {"Echo", "Echo-2"}
    for start in range(0, 400, 40):
        assert 28 <= Counter(names[start : start + 40])["Echo"] <= 32


def test_each_environment_of_a_mixture_goes_through_its_own_epochs():
    configs = [EnvConfig(id=ECHO, args={"tasks": 3}), EnvConfig(id=ECHO, args={"tasks": 4}, weight=2.0)]
    buffer = TaskBuffer(load_setups(configs, "train"), BufferConfig(), 0)
    drawn = [buffer.draw(group) for group in range(90)]
    for name, tasks in (("Echo", 3), ("Echo-2", 4)):
        own = [d.index for d in drawn if d.env.name == name]
        assert sorted(own[:tasks]) == sorted(own[tasks : 2 * tasks]) == list(range(tasks))


def test_statistics_follow_the_groups_of_a_task():
    buffer = _buffer()
    task = buffer.draw(0)
    buffer.observe(0, task, [0.0, 1.0])
    buffer.observe(9, task, [1.0, 1.0])
    stats = buffer.stats[f"Echo/train-{task.index}"]
    assert (stats.mean, stats.spread, stats.count, stats.last) == (0.5 + 0.3 * 0.5, 0.5 - 0.3 * 0.5, 2, 1.0)
    buffer.observe(10, buffer.draw(1), [])  # dropped without a usable rollout
    assert len(buffer.stats) == 1


def test_difficulty_prefers_tasks_between_floor_and_ceiling():
    buffer = _buffer("difficulty", tasks=4)
    for index, rewards in enumerate([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]):
        task = next(d for d in map(buffer.draw, range(200)) if d.index == index)
        for _ in range(10):
            buffer.observe(-1, task, rewards)
    buffer.drawn.clear()
    shares = Counter(buffer.draw(group).index for group in range(1000, 2000))
    assert shares[2] > 600
    assert all(shares[index] > 20 for index in (0, 1, 3))  # looked at now and then


def test_difficulty_draws_survive_a_resume_though_statistics_have_moved_on():
    buffer = _buffer("difficulty", tasks=50)
    drawn = {group: buffer.draw(group).index for group in range(6)}
    buffer.observe(0, buffer.draw(0), [0.0, 0.0])
    resumed = _buffer("difficulty", tasks=50)
    resumed.restore(buffer.state())
    assert {group: resumed.draw(group).index for group in range(1, 6)} == {g: drawn[g] for g in range(1, 6)}
    assert resumed.stats == buffer.stats
    assert 0 not in resumed.state()["drawn"]


def _two_envs() -> list[EnvSetup]:
    return load_setups([EnvConfig(id=ECHO, args={"tasks": 3}), EnvConfig(id=ECHO, args={"tasks": 4})], "train")


def test_named_tasks_alone_are_played_and_environments_without_any_take_no_part():
    envs = only_tasks(_two_envs(), ["train-3"])  # the first environment ends at train-2
    assert [(env.name, list(env.tasks)) for env in envs] == [("Echo-2", [{"id": "train-3"}])]
    buffer = TaskBuffer(envs, BufferConfig(), 0)
    assert {(drawn.env.name, drawn.task["id"]) for drawn in map(buffer.draw, range(9))} == {("Echo-2", "train-3")}


def test_an_id_that_two_environments_have_may_name_one_of_them():
    assert [env.name for env in only_tasks(_two_envs(), ["train-1"])] == ["Echo", "Echo-2"]
    assert [env.name for env in only_tasks(_two_envs(), ["Echo-2/train-1"])] == ["Echo-2"]


@given(st.sets(st.integers(0, 6), min_size=1))
def test_as_many_tasks_are_left_as_are_named_in_the_order_of_the_environment(chosen: set[int]):
    (env,) = only_tasks([echo_setup(args={"tasks": 7})], [f"train-{index}" for index in chosen])
    assert [task["id"] for task in env.tasks] == [f"train-{index}" for index in sorted(chosen)]


def test_all_tasks_are_played_when_none_is_named():
    assert [len(env.tasks) for env in only_tasks(_two_envs(), [])] == [3, 4]


def test_every_unknown_task_is_named_with_the_nearest_that_is_there():
    with pytest.raises(ValueError, match=r"orchestrator\.buffer.tasks names 'trian-1'.* Did you mean 'train-1'") as caught:
        only_tasks(_two_envs(), ["trian-1", "train-0", "xyz"])
    assert "names 'xyz', and no training environment has such a task. One that is there is 'Echo-2/train-0'" in str(caught.value)
    assert "'train-0', and" not in str(caught.value)


def test_the_last_part_of_an_id_finds_the_whole():
    (wordle,) = load_setups([EnvConfig(id="wordle", args={"answers": ["crane", "slate", "pride"], "num_validation": 1})], "train")
    word = str(wordle.tasks[0]["answer"])
    with pytest.raises(ValueError, match=f"Did you mean 'wordle/{word}'"):
        only_tasks([wordle], [word])
