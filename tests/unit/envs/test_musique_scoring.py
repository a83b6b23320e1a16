"""Answers and citations, against scores written independently: character by character, and by counting pairs."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.envs.musique.scoring import exact_match, normalize, support_f1, token_f1


def oracle_words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    words, word = [], ""
    for character in kept:
        if character.isspace():
            words.append(word)
            word = ""
        else:
            word += character
    return [word for word in [*words, word] if word not in ("", "a", "an", "the")]


def oracle_f1(prediction: str, truth: str) -> float:
    left, right = oracle_words(prediction), oracle_words(truth)
    if not left or not right:
        return 1.0 if left == right else 0.0
    unmatched, matched = list(right), 0
    for word in left:
        if word in unmatched:
            unmatched.remove(word)
            matched += 1
    if not matched:
        return 0.0
    precision, recall = matched / len(left), matched / len(right)
    return 2 * precision * recall / (precision + recall)


WORDS = st.sampled_from(
    ["a", "an", "the", "The", "Hall", "hall,", "G.", "Stanley", "1945", "'t", "über", "-", "theatre", " ", "\n"]
)
PHRASES = st.lists(WORDS, max_size=6).map(" ".join) | st.text(alphabet="aAnthe .,-\t\nxé1", max_size=12)


@given(prediction=PHRASES, truths=st.lists(PHRASES, min_size=1, max_size=4))
@settings(deadline=None)
def test_exact_match_and_f1_are_the_best_over_all_aliases(prediction: str, truths: list[str]) -> None:
    assert token_f1(prediction, truths) == pytest.approx(max(oracle_f1(prediction, truth) for truth in truths))
    assert exact_match(prediction, truths) == float(any(oracle_words(prediction) == oracle_words(truth) for truth in truths))


@given(text=st.text(max_size=30))
@settings(deadline=None)
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    once = normalize(text)
    assert normalize(normalize(once)) == normalize(once)
    assert token_f1(text, [text]) == exact_match(text, [text]) == 1.0


@given(predicted=st.sets(st.integers(0, 9)), truth=st.sets(st.integers(0, 9)))
@settings(deadline=None)
def test_support_f1_counts_sets_of_paragraphs(predicted: set[int], truth: set[int]) -> None:
    hits = sum(1 for index in predicted for other in truth if index == other)
    precision = hits / len(predicted) if predicted else 0.0
    recall = hits / len(truth) if truth else 0.0
    expected = 2 * precision * recall / (precision + recall) if hits else float(not predicted and not truth)
    assert support_f1([*predicted, *predicted], truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "truths", "exact", "f1"),
    [
        ("the G. Stanley Hall!", ["G. Stanley Hall", "Stanley Hall"], 1.0, 1.0),
        ("Hall", ["G. Stanley Hall", "Stanley Hall"], 0.0, 2 / 3),
        ("Hall Hall", ["Hall"], 0.0, 2 / 3),
        ("", ["Hall"], 0.0, 0.0),
        ("The", ["an"], 1.0, 1.0),
        ("", [""], 1.0, 1.0),
        ("theatre", ["atre"], 0.0, 0.0),
        ("1,945", ["1945"], 1.0, 1.0),
        ("well-known", ["well known"], 0.0, 0.0),
    ],
)
def test_scores_by_hand(prediction: str, truths: list[str], exact: float, f1: float) -> None:
    assert exact_match(prediction, truths) == exact
    assert token_f1(prediction, truths) == pytest.approx(f1)


def test_citations_by_hand() -> None:
    assert support_f1([], []) == 1.0
    assert support_f1([1], []) == support_f1([], [1]) == 0.0
    assert support_f1([1, 2, 3], [1, 3]) == pytest.approx(0.8)
