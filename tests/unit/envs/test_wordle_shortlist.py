"""The shortlist names the answer among other words of its split, and the marks thin it out."""

import pytest

from turnwise.envs import make
from turnwise.envs.wordle.rules import feedback


def shortlist_of(observation: str) -> list[str]:
    return observation.partition("one of: ")[2].partition(".")[0].split(", ")


def test_the_answer_is_on_the_list_and_the_others_are_of_its_split() -> None:
    env = make("wordle", {"shortlist": 8, "style": "shortlist"})
    held_out = {row["answer"] for row in env.tasks("validation")}
    for row in env.tasks("validation")[:20]:
        observation, _ = env.reset(seed=3, options={"task": row})
        words = shortlist_of(observation)
        assert len(set(words)) == 8
        assert row["answer"] in words
        assert set(words) <= held_out


def test_equal_seeds_draw_equal_lists_and_other_seeds_others() -> None:
    env = make("wordle", {"shortlist": 8, "style": "shortlist"})
    row = env.tasks("train")[0]
    first, again, other = (env.reset(seed=seed, options={"task": row})[0] for seed in (1, 1, 2))
    assert first == again
    assert set(shortlist_of(first)) != set(shortlist_of(other))


def test_only_words_that_fit_the_marks_stay() -> None:
    env = make("wordle", {"shortlist": 12, "style": "shortlist"})
    row = env.tasks("train")[5]
    observation, _ = env.reset(seed=0, options={"task": row})
    words = shortlist_of(observation)
    guess = next(word for word in words if word != row["answer"])
    observation = env.step(guess)[0]
    mask = feedback(guess, row["answer"])
    assert shortlist_of(observation) == [word for word in words if feedback(guess, word) == mask]


@pytest.mark.parametrize(
    "args",
    [{"shortlist": 8}, {"style": "shortlist"}, {"shortlist": 1, "style": "shortlist"}, {"shortlist": 101, "style": "shortlist"}],
)
def test_a_shortlist_that_cannot_be_shown_or_drawn_is_refused(args: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"args\.shortlist"):
        make("wordle", args)
