"""Reading the answer in a solution, in the field's two ways."""

import re
from typing import Literal

Scoring = Literal["strict", "flexible"]

TAIL = 300  # characters from the end that count: the answer stands there, and a search of the whole would find guesses
MARKED = re.compile(r"#### (\-?[0-9\.\,]+)")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def marked_answer(solution: str) -> str | None:
    """Strict reading: what follows the last `#### ` among the last 300 characters, without commas and `$`."""
    found = MARKED.findall(solution[-TAIL:])
    return _plain(found[-1]) if found else None


def last_number(solution: str) -> str | None:
    """Flexible reading: the last number among the last 300 characters, without commas."""
    found = NUMBER.findall(solution[-TAIL:])
    return _plain(found[-1]) if found else None


def is_correct(solution: str, truth: str, *, scoring: Scoring) -> bool:
    """Whether the answer read is, as a string, the true one."""
    return (marked_answer(solution) if scoring == "strict" else last_number(solution)) == truth


def true_answer(answer: str) -> str:
    """The number of a data set row: after `#### ` where it is a worked solution, else all of it.

    Raises:
        ValueError: when there is none.
    """
    truth = marked_answer(answer)
    if truth is None and NUMBER.fullmatch(answer.strip()):
        truth = _plain(answer.strip())
    if truth is None:
        raise ValueError(f"the answer must end with '#### number' or be a number, but ends with {answer[-40:]!r}")
    return truth


def _plain(number: str) -> str:
    return number.replace(",", "").replace("$", "")
