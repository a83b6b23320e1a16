"""Observations as text."""

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from turnwise.adapters.gymnasium_env.observations import MOST_NUMBERS, Describer
from turnwise.envs.base import MAX_CHARACTERS, FreeText

HAND = spaces.Tuple([spaces.Discrete(32), spaces.Discrete(11), spaces.Discrete(2)])
ROOM = spaces.Dict({"place": spaces.Discrete(4), "view": spaces.Box(0, 1, (2, 2)), "note": spaces.Text(20)})


def describer(space: spaces.Space[Any], template: str | None = None, names: list[str] | None = None) -> Describer:
    return Describer(space, template=template, names=names, source="Game-v0")


@pytest.mark.parametrize(
    ("space", "observation", "text"),
    [
        (spaces.Text(50), "Try 1 of 6.\né", "Try 1 of 6.\né"),
        (FreeText(), "", ""),
        (spaces.Discrete(5), np.int64(3), "3"),
        (spaces.Box(-1, 1, (3,)), np.array([0.1234567, -1.0, 0.0], dtype=np.float32), "0.1235, -1, 0"),
        (spaces.Box(0, 9, (2, 2), dtype=np.int64), np.array([[1, 2], [3, 4]]), "1 2\n3 4"),
        (spaces.MultiDiscrete([3, 4]), np.array([2, 3]), "2, 3"),
        (spaces.MultiBinary(3), np.array([1, 0, 1], dtype=np.int8), "1, 0, 1"),
        (HAND, (14, 10, 0), "14, 10, 0"),
        (ROOM, {"place": 2, "view": np.eye(2, dtype=np.float32), "note": "hot"}, "note: hot\nplace: 2\nview: 1 0\n0 1"),
    ],
)
def test_each_kind_of_space_has_its_text(space: spaces.Space[Any], observation: Any, text: str):
    assert describer(space)(observation) == text


def test_names_of_values_and_of_parts():
    assert describer(spaces.Discrete(2, start=1), names=["ice", "hole"])(2) == "hole"
    assert describer(HAND, names=["sum", "dealer", "ace"])((14, 10, 1)) == "sum: 14\ndealer: 10\nace: 1"


def test_a_template_has_parts_keys_and_the_whole_text():
    assert (
        describer(spaces.Box(-9, 9, (2,)), "x {0:.1f}, v {1:+.2f}")(np.array([1.26, 0.5], dtype=np.float32)) == "x 1.3, v +0.50"
    )
    assert describer(spaces.Discrete(4), "You are at {0}.", ["A", "B", "C", "D"])(1) == "You are at B."
    assert describer(ROOM, "{note} at {place}")({"place": 1, "view": np.zeros((2, 2)), "note": "ok"}) == "ok at 1"
    assert describer(HAND, "Now: {text}")((1, 2, 0)) == "Now: 1, 2, 0"


@given(seed=st.integers(0, 1 << 30))
def test_whatever_a_space_samples_has_a_text(seed: int):
    for space in (spaces.Discrete(7, start=-3), spaces.Box(-np.inf, np.inf, (4,)), HAND, ROOM, spaces.MultiDiscrete([2, 9])):
        space.seed(seed)
        assert describer(space)(space.sample())


def test_text_stays_as_it_is_whatever_the_space_says():
    assert describer(HAND)("You hold 14.") == "You hold 14."
    custom: spaces.Space[Any] = spaces.Space()
    assert describer(custom)("free text") == "free text"


@pytest.mark.parametrize(
    ("space", "observation", "told"),
    [
        (HAND, (1, 2), "which is not of its space"),
        (HAND, None, "which is not of its space"),
        (ROOM, {"place": 1}, "which is not of its space"),
        (spaces.Discrete(3), "x" * (MAX_CHARACTERS + 1), "more than the"),
        (spaces.Text(9), None, "the observation of gymnasium:Game-v0 is None, not text"),
        (spaces.Box(0, 1, (3,)), np.zeros(4), "which is not of its space .*cannot reshape"),
    ],
)
def test_an_observation_outside_its_space_is_an_error(space: spaces.Space[Any], observation: Any, told: str):
    with pytest.raises(ValueError, match=told):
        describer(space)(observation)


def test_an_observation_without_its_name_is_an_error():
    with pytest.raises(ValueError, match="which is not of its space"):
        describer(spaces.Discrete(2), names=["ice", "hole"])(7)


@pytest.mark.parametrize(
    ("space", "template", "names", "told"),
    [
        (spaces.Box(0, 255, (96, 96, 3), np.uint8), None, None, f"27648 numbers at once, more than the {MOST_NUMBERS}"),
        (spaces.Tuple([spaces.Box(0, 1, (2000,))]), None, None, "2000 numbers at once"),
        (spaces.Sequence(spaces.Discrete(2)), None, None, "of which no text is made"),
        (HAND, "{7}", None, r"args.observation = '\{7\}' cannot be filled in"),
        (HAND, "{sum}", None, "cannot be filled in"),
        (HAND, "{0", None, "cannot be filled in"),
        (HAND, None, ["sum"], "args.observation_names has 1 names, but there are 3 to be given"),
        (spaces.Discrete(2), None, "ab", "must be a list of names"),
        (ROOM, None, ["a"], "args.observation_names does not fit"),
    ],
)
def test_what_cannot_be_said_is_refused_before_anything_begins(
    space: spaces.Space[Any], template: str | None, names: list[str] | None, told: str
):
    with pytest.raises(ValueError, match=told):
        describer(space, template, names)
