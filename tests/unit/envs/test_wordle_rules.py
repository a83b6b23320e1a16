"""The feedback of a guess, and what guesses prove."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.envs.wordle.rules import Knowledge, feedback

few_letters = st.text(alphabet="abc", min_size=5, max_size=5)  # few letters: many repetitions
words = st.one_of(few_letters, st.text(alphabet="abcdefghijklmnopqrstuvwxyz", min_size=5, max_size=5))


@pytest.mark.parametrize(
    ("guess", "answer", "mask"),
    [
        ("crane", "crane", "GGGGG"),
        ("eerie", "crane", "--Y-G"),  # one e in the answer, and it is the green one
        ("speed", "abide", "--Y-Y"),  # one e, the left of two is yellow
        ("speed", "erase", "Y-YY-"),
        ("allee", "eagle", "YY-YG"),  # one l: only the left one is yellow
        ("llama", "label", "GYY--"),  # the second l has a partner left, the second a has none
        ("geese", "elegy", "YYG--"),
        ("mamma", "maxim", "GGY--"),
    ],
)
def test_repeated_letters_are_marked_as_often_as_the_answer_has_them(guess: str, answer: str, mask: str) -> None:
    assert feedback(guess, answer) == mask


@given(guess=words, answer=words)
@settings(deadline=None)
def test_the_mask_agrees_with_counting_letters(guess: str, answer: str) -> None:
    mask = feedback(guess, answer)
    for guessed, wanted, mark in zip(guess, answer, mask, strict=True):
        assert (mark == "G") == (guessed == wanted)
    for letter in set(guess):
        marks = [mark for guessed, mark in zip(guess, mask, strict=True) if guessed == letter]
        assert len([mark for mark in marks if mark != "-"]) == min(Counter(guess)[letter], Counter(answer)[letter])
        misplaced = [mark for mark in marks if mark != "G"]
        assert misplaced == sorted(misplaced, key="Y-".index), "yellows stand left of the greys of their letter"


def test_words_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"zip\(\)"):
        feedback("four", "fives")


@given(guesses=st.lists(words, max_size=6), answer=words)
@settings(deadline=None)
def test_what_is_known_never_speaks_against_the_answer(guesses: list[str], answer: str) -> None:
    known = Knowledge.of([(guess, feedback(guess, answer)) for guess in guesses], 5)
    assert known.honoured_share(answer) == 1.0
    assert known.dead_letters(answer) == 0
    assert all(letter in (None, answer[position]) for position, letter in enumerate(known.pattern))
    assert all(count <= Counter(answer)[letter] for letter, count in known.counts.items())
    assert not known.dead & set(answer)


@given(guesses=st.lists(words, min_size=1, max_size=6), answer=words)
@settings(deadline=None)
def test_a_further_guess_never_lessens_what_is_known(guesses: list[str], answer: str) -> None:
    history = [(guess, feedback(guess, answer)) for guess in guesses]
    shares = [Knowledge.of(history[:n], 5).solved_share for n in range(len(history) + 1)]
    assert shares[0] == 0.0
    assert shares == sorted(shares)
    assert Knowledge.of([*history, (answer, "GGGGG")], 5).solved_share == 1.0


def test_knowledge_of_two_guesses_by_hand() -> None:
    known = Knowledge.of([("crane", "-GY--"), ("trait", "-GY--")], 5)  # the answer could be "aroma" without its first a
    assert known.pattern == (None, "r", None, None, None)
    assert known.unplaced == {"a": 1}
    assert known.refuted == {(2, "a")}
    assert known.dead == set("cneti")
    assert known.solved_share == pytest.approx(0.3)
    assert known.honoured_share("bravo") == 0.5  # r kept, a where it was refuted
    assert known.honoured_share("aroma") == 1.0
    assert known.honoured_share("sloth") == 0.0
    assert known.dead_letters("crate") == 3


def test_a_yellow_letter_does_not_count_where_another_letter_is_known() -> None:
    known = Knowledge.of([("crane", "G---Y")], 5)
    assert known.honoured_share("eclat") == 0.0
    assert known.honoured_share("cedar") == 1.0
