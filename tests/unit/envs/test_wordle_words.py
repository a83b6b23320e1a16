"""Word lists and their splits."""

from importlib import resources
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.envs import make
from turnwise.envs.wordle import Wordle
from turnwise.envs.wordle.words import read_words, split_words

ANSWERS = read_words(None, key="answers", default="answers.txt")
ALLOWED = read_words(None, key="allowed", default="allowed.txt")


def answers_of(env: Wordle, split: str) -> list[str]:
    return [row["answer"] for row in env.tasks(split)]


def test_our_lists_are_packaged_with_their_notice() -> None:
    assert (len(ANSWERS), len(ALLOWED)) == (2079, 11457)
    assert set(ANSWERS) <= set(ALLOWED)
    assert all(len(word) == 5 and word.isascii() and word.islower() for word in ALLOWED)
    notice = resources.files("turnwise.envs.wordle").joinpath("COPYRIGHT.scowl").read_text(encoding="utf-8")
    assert "SCOWL" in notice
    assert "UKACD" in notice


def test_sixty_words_to_train_and_fifteen_held_out_share_none() -> None:
    env = Wordle(num_train=60, num_validation=15, seed=1)
    train, validation = answers_of(env, "train"), answers_of(env, "validation")
    assert (len(set(train)), len(set(validation))) == (60, 15)
    assert not set(train) & set(validation)
    assert [row["id"] for row in env.tasks("train")] == [f"wordle/{word}" for word in train]


def test_by_default_a_hundred_words_are_held_out() -> None:
    env = Wordle()
    assert (len(env.tasks("train")), len(env.tasks("validation"))) == (1979, 100)
    assert not set(answers_of(env, "train")) & set(answers_of(env, "validation"))


def test_a_single_puzzle_is_its_own_validation_split() -> None:
    env = Wordle(answers=["frost"])
    assert env.tasks("train") == env.tasks("validation") == ({"id": "wordle/frost", "answer": "frost"},)


def test_the_seed_makes_the_split() -> None:
    assert answers_of(Wordle(seed=1), "validation") == answers_of(Wordle(seed=1), "validation")
    assert answers_of(Wordle(seed=1), "validation") != answers_of(Wordle(seed=2), "validation")


@given(
    size=st.integers(1, 120),
    num_train=st.none() | st.integers(0, 120),
    num_validation=st.none() | st.integers(0, 120),
    seed=st.integers(0, 5),
    order=st.randoms(),
)
@settings(deadline=None)
def test_every_split_is_disjoint_of_the_right_size_and_free_of_order(
    size: int, num_train: int | None, num_validation: int | None, seed: int, order: Random
) -> None:
    words = list(ANSWERS[:size])
    if (num_train or 0) + (num_validation or 0) > size:
        with pytest.raises(ValueError, match="lower one of them or give a longer list"):
            split_words(tuple(words), num_train, num_validation, seed)
        return
    train, validation = split_words(tuple(words), num_train, num_validation, seed)
    order.shuffle(words)
    assert split_words(tuple(words), num_train, num_validation, seed) == (train, validation)
    assert len(train) == (
        num_train if num_train is not None else size - len(validation) if size >= 10 or num_validation else size
    )
    assert num_validation is None or len(validation) == num_validation
    if num_train is not None or num_validation is not None or size >= 10:
        assert not set(train) & set(validation)


def test_a_larger_training_part_moves_no_held_out_word() -> None:
    assert split_words(ANSWERS, 60, 15, 0)[1] == split_words(ANSWERS, 600, 15, 0)[1]
    assert split_words(ANSWERS, 60, 15, 0)[0] == split_words(ANSWERS, 600, 15, 0)[0][:60]


def test_a_list_may_come_from_a_file_with_comments(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("# my words\nFrost\ncrane  # twice\n\ncrane\n")
    env = Wordle(answers=path)
    assert sorted(answers_of(env, "train")) == ["crane", "frost"]
    path.write_text("frost\ncrane\nsloth\n")
    assert len(Wordle(answers=str(path)).tasks("train")) == 3, "a changed file is read again"


def test_held_out_words_may_be_given() -> None:
    env = Wordle(answers=["frost", "crane"], validation_answers=["sloth"])
    assert sorted(answers_of(env, "train")) == ["crane", "frost"]
    assert answers_of(env, "validation") == ["sloth"]
    many = Wordle(answers=list(ANSWERS[:100]), validation_answers=list(ANSWERS[100:200]), num_train=60, num_validation=15)
    assert (len(many.tasks("train")), len(many.tasks("validation"))) == (60, 15)


def test_words_of_six_letters_make_a_game_of_six_letters() -> None:
    env = Wordle(answers=["planet"], allowed=["frozen", "bottle"])
    observation, _ = env.reset()
    assert "6-letter" in env.system_prompt
    observation, *_ = env.step("bottle")
    assert observation.startswith("bottle -> --Y-YY\n")


def test_bad_lists_are_refused_by_name_and_place(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("frost\ncr4ne\n")
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    for args, message in [
        ({"answers": path}, r"mine\.txt:2: 'cr4ne' is not a word"),
        ({"answers": empty}, r"empty\.txt holds no word"),
        ({"answers": tmp_path / "none.txt"}, r"args\.answers = '.*none\.txt' cannot be read as a list of words"),
        ({"answers": []}, r"args\.answers holds no word"),
        ({"answers": ["frost", "planet"]}, r"args\.answers\[1\]: 'planet' has 6 letters, but 'frost' of the same list has 5"),
        ({"answers": ["planet"]}, r"args\.answers has words of 6 letters, but args\.allowed of 5; give args\.allowed"),
        ({"answers": ["frost"], "num_train": 2}, r"num_train = 2 and num_validation = None cannot be taken from 1 words"),
        ({"answers": ["frost"], "num_validation": 2}, r"num_validation = 2 cannot be taken from 1 words"),
        ({"num_train": -1}, r"num_train = -1"),
        ({"answers": ["frost"], "validation_answers": ["frost"]}, r"args\.validation_answers must not be trained on.*frost"),
        ({"answers": ["frost"], "validation_answers": ["planet"]}, r"words of 6 letters, args\.answers of 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            make("wordle", args)


def test_an_unknown_split_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ValueError, match=r"no split 'validate'\. Did you mean 'validation'\? Known: train, validation\."):
        Wordle().tasks("validate")
