"""The training arithmetic, against the counts of experiments that were run by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.config import ConfigError, RLConfig
from turnwise.envs import make
from turnwise.launch.arithmetic import Arithmetic, count_tasks, training_arithmetic


def config(batch: int, group: int, **length: float) -> RLConfig:
    return RLConfig.model_validate(
        {**length, "orchestrator": {"batch_size": batch, "rollouts_per_example": group, "env": [{"id": "wordle"}]}}
    )


@pytest.mark.parametrize(
    ("examples", "batch", "group", "steps_per_epoch"),
    [(60, 4, 2, 30), (7473, 2048, 8, 29), (7473, 16, 8, 3736), (40, 32, 8, 10), (10, 8, 4, 5)],
)
def test_steps_of_an_epoch_are_those_of_the_experiments(examples: int, batch: int, group: int, steps_per_epoch: int):
    arithmetic = training_arithmetic(config(batch, group, epochs=1), lambda _: examples)
    assert (arithmetic.steps_per_epoch, arithmetic.max_steps) == (steps_per_epoch, steps_per_epoch)


def test_epochs_fix_the_number_of_steps():
    assert training_arithmetic(config(4, 2, epochs=70), lambda _: 60).max_steps == 2100
    assert training_arithmetic(config(32, 8, epochs=0.5), lambda _: 40).max_steps == 5


def test_steps_fix_the_number_of_epochs():
    arithmetic = training_arithmetic(config(32, 8, max_steps=200), lambda _: 40)
    assert (arithmetic.epochs, arithmetic.examples_per_step) == (20.0, 4)


def test_tasks_of_all_environments_count():
    mixed = RLConfig.model_validate({"max_steps": 1, "orchestrator": {"env": [{"id": "a"}, {"id": "b"}]}})
    assert training_arithmetic(mixed, lambda env: {"a": 3, "b": 4}[env.id]).examples == 7


def test_epochs_that_come_to_no_step_are_refused_with_the_numbers():
    with pytest.raises(
        ConfigError, match=r"epochs = 1 come to no whole step: 3 training tasks x 8 rollouts = 24 rollouts an epoch"
    ):
        training_arithmetic(config(32, 8, epochs=1), lambda _: 3)


@settings(deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 64), st.integers(2, 16))
def test_an_epoch_never_asks_for_more_rollouts_than_there_are(examples: int, groups: int, group: int):
    arithmetic = Arithmetic(examples, groups * group, group, 1)
    assert arithmetic.steps_per_epoch * arithmetic.batch_size <= examples * group
    assert (arithmetic.steps_per_epoch + 1) * arithmetic.batch_size > examples * group


def named(*tasks: str) -> RLConfig:
    env = {"id": "wordle", "args": {"answers": ["crane", "frost", "slate", "pride"], "num_validation": 1}}
    settings = {"env": [env], "buffer": {"tasks": list(tasks)}, "batch_size": 16, "rollouts_per_example": 8}
    return RLConfig.model_validate({"max_steps": 4, "orchestrator": settings})


def test_only_tasks_that_are_named_are_counted():
    ids = [str(row["id"]) for row in make("wordle", named().orchestrator.env[0].args).tasks("train")]
    arithmetic = training_arithmetic(named(ids[1]), lambda _: 3)
    assert (arithmetic.examples, arithmetic.epochs) == (1, 8.0)


def test_a_task_that_is_not_there_is_refused_before_anything_starts():
    with pytest.raises(ConfigError, match=r"orchestrator\.buffer.tasks names 'nonsense'"):
        training_arithmetic(named("nonsense"), lambda _: 3)


def test_the_tasks_of_a_real_environment_are_counted():
    env = RLConfig.model_validate({"orchestrator": {"env": [{"id": "wordle", "args": {"num_train": 17}}]}}).orchestrator.env[0]
    assert count_tasks(env) == 17


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"id": "wordel"}, "wordle"),
        ({"id": "wordle", "args": {"num_trian": 3}}, "num_train"),
        ({"id": "nowhere.module:Env"}, "nowhere"),
        ({"id": "wordle", "reward": {"weights": {"wn": 2.0}}}, "its components are .*win"),
    ],
)
def test_an_environment_that_cannot_be_made_is_named_with_the_reason(env: dict[str, object], words: str):
    table = RLConfig.model_validate({"orchestrator": {"env": [env]}}).orchestrator.env[0]
    with pytest.raises(ConfigError, match=words) as caught:
        count_tasks(table)
    assert f'orchestrator.env id = "{env["id"]}" cannot be used' in str(caught.value)
