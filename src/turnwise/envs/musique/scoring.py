"""Scores of answers and citations as the data set's own evaluation defines them (Trivedi et al., TACL 2022, arXiv 2108.00573)."""

import re
import string
from collections import Counter
from collections.abc import Collection, Sequence

PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalize(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, words separated by one space each."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(prediction: str, truths: Sequence[str]) -> float:
    """1.0 when the normalised prediction equals one of the normalised truths, else 0.0.

    Raises:
        ValueError: without a truth.
    """
    predicted = normalize(prediction)
    return max(float(predicted == normalize(truth)) for truth in truths)


def token_f1(prediction: str, truths: Sequence[str]) -> float:
    """F1 over normalised words as a multiset, the best over the truths; where one side has no word, 1.0 only if both have none.

    Raises:
        ValueError: without a truth.
    """
    predicted = Counter(normalize(prediction).split())
    return max(_f1(predicted, Counter(normalize(truth).split())) for truth in truths)


def support_f1(predicted: Collection[int], truth: Collection[int]) -> float:
    """F1 over sets of paragraph indices; 1.0 when both are empty."""
    cited, supporting = set(predicted), set(truth)
    if not cited and not supporting:
        return 1.0
    return 2 * len(cited & supporting) / (len(cited) + len(supporting))


def _f1(predicted: "Counter[str]", truth: "Counter[str]") -> float:
    words = predicted.total() + truth.total()
    if not predicted or not truth:
        return float(words == 0)
    return 2 * (predicted & truth).total() / words
