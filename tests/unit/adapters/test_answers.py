"""What environments of others may return."""

from decimal import Decimal

import numpy as np
import pytest

from turnwise.adapters.answers import bounded_text, finite_number
from turnwise.envs.base import MAX_CHARACTERS


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.5), np.int64(-2)])
def test_numbers_of_python_and_numpy_are_taken(value: float):
    assert finite_number(value, what="the reward") == float(value)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "the reward is None, not a number"),
        ("1.0", "the reward is '1.0', not a number"),
        (True, "the reward is True, not a number"),
        ([1.0], "not a number"),
        (Decimal(1), "not a number"),
        (float("nan"), "the reward is nan; it must be a finite number"),
        (np.float64("inf"), "the reward is inf"),
        ("x" * 200, "the reward is '" + "x" * 79 + "..., not a number"),
    ],
)
def test_anything_else_is_an_error_and_not_0(value: object, told: str):
    with pytest.raises(ValueError, match=told):
        finite_number(value, what="the reward")


def test_text_that_no_observation_may_hold_is_an_error():
    assert bounded_text("x" * MAX_CHARACTERS, what="the observation") == "x" * MAX_CHARACTERS
    with pytest.raises(ValueError, match=f"the observation has {MAX_CHARACTERS + 1} characters, more than the {MAX_CHARACTERS}"):
        bounded_text("x" * (MAX_CHARACTERS + 1), what="the observation")
    with pytest.raises(ValueError, match="the observation is None, not text"):
        bounded_text(None, what="the observation")
