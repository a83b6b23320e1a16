"""Real data sets of reasoning-gym."""

from typing import Any

import pytest

from turnwise.adapters.reasoning_gym import ReasoningGym
from turnwise.envs import make

reasoning_gym = pytest.importorskip("reasoning_gym")
pytestmark = [
    pytest.mark.reasoning_gym,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the package's own imports, on each Python others
]
NAMES = ["leg_counting", "chain_sum", "syllogism", "letter_counting", "number_sorting", "pool_matrix", "list_functions"]
SMALL = {"num_train": 20, "num_validation": 20}


def data(name: str, **args: Any) -> ReasoningGym:
    env = make(f"reasoning_gym:{name}", args)
    assert isinstance(env, ReasoningGym)
    return env


@pytest.mark.parametrize("name", NAMES)
def test_the_right_answer_scores_1_and_entries_are_stable(name: str):
    env, again = data(name, **SMALL), data(name, **SMALL)
    for split in ("train", "validation"):
        for task in env.tasks(split):
            observation, _ = env.reset(options={"task": task})
            assert observation == again.reset(options={"task": task})[0]
            assert env.step(f"It is <answer>{env.entry['answer']}</answer>.")[1] == 1.0


@pytest.mark.parametrize("reply", ["", "<answer>", "<answer>[[[</answer>", "nan", "1e999", "{'a':", "\x00", "é" * 3000])
@pytest.mark.parametrize("name", NAMES)
def test_hostile_text_scores_below_1(name: str, reply: str):
    env = data(name, **SMALL)
    env.reset()
    assert env.step(reply)[1] < 1.0


def test_no_question_with_large_numbers_is_trained_on_and_held_out():
    env = data("leg_counting", num_train=300, num_validation=300)
    asked = [{env.reset(options={"task": task})[0] for task in env.tasks(split)} for split in ("train", "validation")]
    assert not asked[0] & asked[1]


def test_entries_are_those_of_the_package_and_its_scores_too():
    env = data("leg_counting", dataset={"max_animals": 4}, seed=42, instruction="")
    theirs = reasoning_gym.create_dataset("leg_counting", seed=42, size=1024, max_animals=4)
    for index in (0, 7, 1023):
        observation, _ = env.reset(options={"task": env.tasks("train")[index]})
        assert observation == theirs[index]["question"].strip()
        assert env.step("288")[1] == theirs.score_answer("288", theirs[index])


def test_a_composite_is_theirs():
    parts = [{"name": "chain_sum", "weight": 2.0, "config": {"max_terms": 2}}, {"name": "leg_counting"}]
    env = data("composite", datasets=parts, **SMALL)
    sources = []
    for task in env.tasks("train"):
        env.reset(options={"task": task})
        sources.append(env.entry["metadata"]["source_dataset"])
        *_, info = env.step(f"<answer>{env.entry['answer']}</answer>")
        assert info["metrics"][f"score_{sources[-1]}"] == 1.0
    assert set(sources) == {"chain_sum", "leg_counting"}


def test_a_scorer_of_theirs_that_raises_is_an_error_or_a_wrong_answer():
    env = data("prime_factorization", **SMALL)
    env.reset()
    with pytest.raises(RuntimeError, match=r"args\.scoring_errors = 'wrong'"):
        env.step("no number")
    env = data("prime_factorization", scoring_errors="wrong", **SMALL)
    env.reset()
    assert env.step("no number")[4]["metrics"]["scoring_error_rate"] == 1.0
