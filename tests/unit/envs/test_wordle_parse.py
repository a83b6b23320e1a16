"""Reading guesses out of replies."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.envs.wordle.parse import Guess, read_guess


@pytest.mark.parametrize("reply", ["crane", "CRANE", "  Crane\n"])
def test_a_bare_word_is_the_strict_form(reply: str) -> None:
    assert read_guess(reply, length=5, form="word") == Guess("crane", strict=True)


@pytest.mark.parametrize(
    "reply", ["<guess>crane</guess>", "It has an r < s.\n<guess> CRANE </guess>\n", "<think>a < b</think><guess>Crane</guess>"]
)
def test_a_reply_that_ends_with_its_only_tag_is_the_strict_tagged_form(reply: str) -> None:
    assert read_guess(reply, length=5, form="tag") == Guess("crane", strict=True)


@pytest.mark.parametrize(
    ("reply", "form"),
    [
        ("crane.", "word"),
        ("crane slate", "word"),
        ("<guess>crane</guess>", "word"),
        ("crane", "tag"),
        ("<guess>crane</guess> is my guess", "tag"),
        ("<guess>slate</guess><guess>crane</guess>", "tag"),
        ("<guess>cranes</guess>", "tag"),
        ("<GUESS>crane</GUESS>", "tag"),
        ("cranes", "word"),
        ("", "word"),
    ],
)
def test_anything_else_is_not_strict(reply: str, form: str) -> None:
    assert not read_guess(reply, length=5, form=form).strict  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "reply", "word"),
    [
        (1, "<guess>slate</guess> no, <guess>crane</guess> after all", "crane"),
        (1, "Maybe SLATE. <Guess>crane", "crane"),
        (1, "<guess>slate <guess>crane</guess>", "crane"),
        (1, "<guess>My word: **crane**</guess> SLATE", "crane"),
        (1, "SLATE <guess></guess>", None),
        (2, "**CRANE**", "crane"),
        (2, "cranes!", "cranes"),
        (2, "a" * 21, None),
        (2, "42", None),
        (3, "I pick **crane** because SLATE is out", "crane"),
        (3, 'Not "slate" but "crane" I think', "crane"),
        (3, "Let us try `Crane` first", "crane"),
        (3, "Let us try “crane” first", "crane"),
        (4, "My guess is CRANE.", "crane"),
        (4, "SLATE is out, so CRANE it shall be", "crane"),
        (5, "my next guess is crane because of those early vowels", "crane"),
        (5, "Guess: crane\nabout that", "crane"),
        (5, "I would guess crane since other words fail", "crane"),
        (6, "Guess: C R A N E", "crane"),
        (6, "it is c-r-a-n-e today", "crane"),
        (7, "maybe crane", "crane"),
        (7, "crane, my guess", "crane"),
        (7, "I guess so", "guess"),
        (7, "I do not know", None),
        (7, "crane_s ncranes 5crane naïve", None),
        (7, "", None),
    ],
)
def test_tolerant_rules_in_their_order(rule: int, reply: str, word: str | None) -> None:
    assert read_guess(reply, length=5, form="word").word == word


def test_words_of_another_length_are_read_by_the_same_rules() -> None:
    assert read_guess("The guess is planet, not crane", length=6, form="word").word == "planet"


@given(reply=st.text(max_size=200) | st.text(alphabet='abcCRANE <>/guess*`"_-:\n', max_size=200))
@settings(deadline=None, max_examples=300)
def test_any_text_gives_the_same_lower_case_word_or_none(reply: str) -> None:
    for form in ("word", "tag"):
        guess = read_guess(reply, length=5, form=form)
        assert guess == read_guess(reply, length=5, form=form)
        assert guess.word is None or (guess.word.isascii() and guess.word.isalpha() and guess.word == guess.word.lower())
        assert not guess.strict or (guess.word is not None and len(guess.word) == 5)


@pytest.mark.parametrize("unit", ["guess ", "guess" + " " * 40, "a b c ", "<guess>", "*", "`", "<", "word is ", "_", "“"])
def test_long_babble_is_read_in_linear_time(unit: str) -> None:
    """A quadratic search of 200,000 characters would outlast the test's time limit many times."""
    assert read_guess(unit * (200_000 // len(unit)), length=5, form="tag").word in (None, "guess", "bcabc", "cabca")
