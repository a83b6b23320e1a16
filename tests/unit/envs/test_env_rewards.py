"""Composing a reward from components."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.config import RewardConfig
from turnwise.envs.rewards import check_weights, compose

COMPONENTS = {"format": 0.1, "progress": -0.25, "win": 2.0}


@pytest.mark.parametrize(
    ("mode", "weights", "reward"),
    [
        ("dense", {}, 1.85),
        ("sparse", {}, 2.0),
        ("dense", {"format": 0.0}, 1.75),
        ("dense", {"format": 10.0, "win": 0.5}, 1.75),
        ("sparse", {"format": 10.0, "win": 0.5}, 1.0),
        ("sparse", {"win": 0.0}, 0.0),
    ],
)
def test_dense_pays_all_components_and_sparse_the_outcome(mode: str, weights: dict[str, float], reward: float) -> None:
    config = RewardConfig(mode=mode, weights=weights)  # type: ignore[arg-type]
    assert compose(COMPONENTS, config, outcome_components={"win"}) == pytest.approx(reward)


def test_no_components_pay_nothing() -> None:
    assert compose({}, RewardConfig(), outcome_components={"win"}) == 0.0


@given(components=st.dictionaries(st.sampled_from("abcd"), st.floats(-10, 10)), outcome=st.sets(st.sampled_from("abcd")))
@settings(deadline=None)
def test_dense_is_sparse_when_every_component_is_an_outcome(components: dict[str, float], outcome: set[str]) -> None:
    dense, sparse = RewardConfig(mode="dense"), RewardConfig(mode="sparse")
    assert compose(components, dense, outcome_components=outcome) == compose(components, sparse, outcome_components="abcd")
    rest = {name: value for name, value in components.items() if name not in outcome}
    assert compose(rest, sparse, outcome_components=outcome) == 0.0


def test_weights_of_unknown_components_are_refused() -> None:
    config = RewardConfig(weights={"fromat": 2.0, "win": 1.0})
    with pytest.raises(ValueError, match=r"reward\.weights of wordle names 'fromat'; its components are format, win"):
        check_weights(config, {"format", "win"}, env_id="wordle")
    check_weights(config, (), env_id="undeclared")
    check_weights(RewardConfig(weights={"win": 2.0}), {"format", "win"}, env_id="wordle")
