"""Data sets of reasoning-gym, against a small one that speaks its protocol."""

import sys
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import fake_reasoning_gym
from turnwise.adapters.reasoning_gym import Extraction, ReasoningGym, read_answer
from turnwise.envs import make


@pytest.fixture(autouse=True)
def gym(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in fake_reasoning_gym.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def data(name: str, **args: Any) -> ReasoningGym:
    env = make(f"reasoning_gym:{name}", args)
    assert isinstance(env, ReasoningGym)
    return env


def ask(env: ReasoningGym, reply: str, *, split: str = "train", row: int = 0) -> Any:
    env.reset(options={"task": env.tasks(split)[row]})
    return env.step(reply.format(answer=env.entry["answer"]))


def questions(env: ReasoningGym, split: str) -> list[str]:
    return [env.reset(options={"task": task})[0] for task in env.tasks(split)]


def test_an_adapted_data_set_passes_gymnasiums_own_check():
    check_env(data("sums"), skip_render_check=True)


def test_the_score_is_the_data_sets_own():
    right, partly, wrong = (ask(data("sums"), reply) for reply in ("It is\n<answer> {answer} </answer>", "x{answer}", "?"))
    assert right[:4] == ("Correct.", 1.0, True, False)
    assert right[4] == {
        "reward_components": {"score": 1.0},
        "metrics": {"acc": 1.0, "score": 1.0, "valid_format_rate": 1.0},
    }
    assert 0.5 < partly[1] < 1
    assert partly[4]["metrics"]["acc"] == partly[4]["metrics"]["valid_format_rate"] == 0.0
    assert wrong[:2] == ("Not correct.", 0.0)


def test_tags_pay_as_a_component_of_their_own():
    env = data("sums", format_reward=0.2)
    assert ask(env, "<answer>?</answer>")[4]["reward_components"] == {"score": 0.0, "format": 0.2}
    assert ask(env, "{answer}")[1] == 1.0


def test_the_question_is_followed_by_the_instruction():
    env = data("sums", instruction="Reply with a number.", show_answer=True, dataset={"terms": 1})
    question = env.reset(options={"task": env.tasks("train")[0]})[0]
    assert question == f"{env.entry['answer']} =\nReply with a number."
    assert env.step("?")[0] == f"Not correct. The answer is {env.entry['answer']}."


def test_tasks_are_stable_and_no_entry_is_trained_on_and_held_out():
    env = data("sums", num_train=200, num_validation=50)
    train, held_out = questions(env, "train"), questions(env, "validation")
    assert train == questions(data("sums", num_train=200, num_validation=0), "train")
    assert not set(train) & set(held_out)
    assert (env.tasks("train")[3]["id"], env.tasks("validation")[0]["seed"]) == ("reasoning_gym/sums/3", 1 << 30)
    assert questions(data("sums", num_train=100, num_validation=1, seed=100), "train") == train[100:]


def test_a_task_from_elsewhere_is_made_from_its_seed():
    env = data("sums", num_train=3, num_validation=1)
    asked = env.reset(options={"task": {"id": "x", "seed": 12}})[0]
    assert asked == data("sums", seed=12).reset(options={"task": {"id": "x", "seed": 12}})[0]


def test_a_composite_draws_from_its_parts_and_scores_each():
    env = data("composite", datasets=[{"name": "sums", "config": {"terms": 1}}, {"name": "sums", "weight": 3.0}], num_train=40)
    asked = questions(env, "train")
    assert 20 < sum("+" in question for question in asked) < 40
    assert ask(env, "{answer}")[4]["metrics"]["score_sums"] == 1.0


def test_what_draws_globally_gets_the_randomness_of_its_seed():
    assert questions(data("list_functions", num_train=3), "train") == questions(data("list_functions", num_train=3), "train")
    assert len(set(questions(data("list_functions", num_train=3), "train"))) == 3


@pytest.mark.parametrize(
    ("score", "told"),
    [(None, "is None, not a number"), ("1", "is '1', not a number"), (float("nan"), "is nan; it must be a finite number")],
)
def test_a_malformed_score_is_an_error_and_not_0(score: object, told: str):
    with pytest.raises(ValueError, match=f"score_answer of reasoning_gym:sums {told}"):
        ask(data("sums", dataset={"score": [score]}), "1")


def test_a_scorer_that_raises_is_an_error_unless_the_user_calls_it_a_wrong_answer():
    with pytest.raises(RuntimeError, match=r"failed on the answer '1': ValueError: .* args.scoring_errors = 'wrong'"):
        ask(data("sums", dataset={"crash": True}), "1")
    taken = ask(data("sums", dataset={"crash": True}, scoring_errors="wrong"), "1")
    assert (taken[1], taken[4]["metrics"]["scoring_error_rate"]) == (0.0, 1.0)
    assert ask(data("sums", scoring_errors="wrong"), "1")[4]["metrics"]["scoring_error_rate"] == 0.0


def test_an_episode_that_is_cut_off_scores_0():
    env = data("sums")
    env.reset()
    assert env.finish("context_full") == {"score": 0.0}


@pytest.mark.parametrize(
    ("reply", "extraction", "answer"),
    [
        ("<answer>4</answer>", "tags", ("4", True)),
        ("<answer>3</answer> no, <ANSWER>\n4\n</ANSWER>.", "tags", ("4", True)),
        ("so\n4\n\n", "tags", ("4", False)),
        ("<answer>4", "tags", ("<answer>4", False)),
        ("<answer></answer>", "tags", (None, True)),
        ("<answer>3</answer>\n4", "last_line", ("4", True)),
        (" a\nb ", "whole", ("a\nb", False)),
        ("", "tags", (None, False)),
        (" \n ", "whole", (None, False)),
    ],
)
def test_where_the_answer_is(reply: str, extraction: Extraction, answer: tuple[str | None, bool]):
    assert read_answer(reply, extraction) == answer


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(reply=st.text(), extraction=st.sampled_from(["tags", "last_line", "whole"]))
def test_hostile_text_never_raises(reply: str, extraction: Extraction):
    env = data("sums", extraction=extraction, num_train=1, num_validation=0)
    env.reset()
    assert 0.0 <= env.step(reply)[1] <= 1.0


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("sumz", {}, r"reasoning_gym has no data set 'sumz'. Did you mean 'sums'\?"),
        ("sums", {"dataset": {"terms": 0}}, "cannot be made with the options {'terms': 0}: terms must be positive"),
        ("sums", {"dataset": {"lines": 3}}, "cannot be made with the options {'lines': 3}"),
        ("sums", {"dataset": {"seed": 3}}, "args.dataset.seed cannot be given"),
        ("sums", {"datasets": []}, "args.datasets belongs to 'reasoning_gym:composite'"),
        ("composite", {}, "args.datasets belongs to 'reasoning_gym:composite', which needs it"),
        ("composite", {"datasets": [{"name": "sums", "wieght": 1}]}, "each table has a name, and may have weight and config"),
        ("composite", {"datasets": [{"name": "sumz"}]}, "no data set 'sumz'"),
        ("sums", {"extraction": "regex"}, "args.extraction = 'regex' must be"),
        ("sums", {"scoring_errors": "ignore"}, "args.scoring_errors = 'ignore' must be"),
        ("sums", {"format_reward": "1"}, "args.format_reward is '1'"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run(name: str, args: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        data(name, **args)


def test_a_missing_package_is_answered_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'turnwise\[reasoning-gym\]'"):
        data("sums")
