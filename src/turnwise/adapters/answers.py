"""Checks of what environments of others return: said clearly here, an error of the rollout there, and never taken for 0."""

import math
import numbers

from turnwise.envs.base import MAX_CHARACTERS


def finite_number(value: object, *, what: str) -> float:
    """`value`, when it is a finite real number (numpy's included).

    Args:
        what: for the message: whose value, and what it should be.

    Raises:
        ValueError: for anything else: None, text, a truth value, NaN, infinity.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{what} is {_short(value)}, not a number")
    if not math.isfinite(value):
        raise ValueError(f"{what} is {float(value)}; it must be a finite number")
    return float(value)


def bounded_text(text: object, *, what: str) -> str:
    """`text`, when it is text that an observation may hold.

    Raises:
        ValueError: for what is no text, or is longer than 2 ** 20 characters.
    """
    if not isinstance(text, str):
        raise ValueError(f"{what} is {_short(text)}, not text")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{what} has {len(text)} characters, more than the {MAX_CHARACTERS} that an observation may have")
    return text


def _short(value: object) -> str:
    text = repr(value)
    return f"{text[:80]}..." if len(text) > 80 else text
