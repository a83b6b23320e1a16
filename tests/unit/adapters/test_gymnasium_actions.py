"""Names of actions in replies."""

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from turnwise.adapters.gymnasium_env.actions import ActionNames, read_action_space

words = st.text(min_size=1, max_size=8).map(lambda text: " ".join(text.split())).filter(bool)
name_lists = st.lists(words, min_size=1, max_size=6, unique_by=str.casefold)


@given(names=name_lists, start=st.integers(-3, 3))
def test_every_name_is_read_as_its_own_action(names: list[str], start: int):
    space = spaces.Discrete(len(names), start=start)
    actions = ActionNames(space, names)
    for number, name in enumerate(names, start):
        assert actions.read(name) == number
        assert actions.read(f"\n {name} \t") == number
        assert actions.read(name) in space


@given(reply=st.text())
def test_no_reply_raises_and_what_is_read_is_an_action(reply: str):
    space = spaces.Discrete(3)
    action = ActionNames(space, ["left", "Pick up", "2"]).read(reply)
    assert action is None or action in space


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        ("LEFT", 0),
        ("I would go Right, not left.", 1),
        ("leftover", None),
        ("pick  up\nthe passenger", 3),
        ("pick up now", 3),
        ("pick", 2),
        ("", None),
        ("<left>", 0),
        ("left" * 10_000, None),
    ],
)
def test_the_first_name_that_stands_as_a_word_counts(reply: str, action: int | None):
    assert ActionNames(spaces.Discrete(4), ["left", "right", "pick", "pick up"]).read(reply) == action


@pytest.mark.parametrize(
    ("reply", "action"), [("1", 1), ("Action 1.", 1), ("10", None), ("-1", None), ("0.5", None), ("1.0", None)]
)
def test_without_names_the_numbers_are_names(reply: str, action: int | None):
    assert ActionNames(spaces.Discrete(2), None).read(reply) == action


def test_numbers_begin_where_the_space_does():
    actions = ActionNames(spaces.Discrete(3, start=-1), None)
    assert (actions.listing, actions.read("-1"), actions.read("1")) == ("-1, 0, 1", -1, 1)
    assert isinstance(actions.read("0"), np.int64)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["left"], "args.actions has 1 names, but the environment has 2 actions"),
        (["left", "LEFT"], "twice; upper and lower case are not told apart"),
        (["left", " "], "holds an empty name"),
        ("lr", "must be a list of 2 names"),
    ],
)
def test_names_that_do_not_fit_are_refused(names: list[str], told: str):
    with pytest.raises(ValueError, match=told):
        ActionNames(spaces.Discrete(2), names)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (2,)),
        spaces.MultiDiscrete([2, 2]),
        spaces.MultiBinary(2),
        spaces.Tuple([spaces.Discrete(2)]),
        spaces.Dict({"a": spaces.Discrete(2)}),
        spaces.OneOf([spaces.Discrete(2)]),
    ],
)
def test_actions_without_names_are_not_supported(space: spaces.Space[object]):
    with pytest.raises(ValueError, match=r"gymnasium:Arm-v0 has the action space .* not supported; wrap the environment"):
        read_action_space(space, None, source="Arm-v0")


def test_names_for_actions_of_text_are_refused():
    assert read_action_space(spaces.Text(9), None, source="Chat-v0") is None
    with pytest.raises(ValueError, match=r"args.actions names actions, but those of gymnasium:Chat-v0 are text"):
        read_action_space(spaces.Text(9), ["a"], source="Chat-v0")
