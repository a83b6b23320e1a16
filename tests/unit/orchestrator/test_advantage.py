"""Advantages: numbers by hand, invariants, and unbiasedness by enumeration of a small decision process."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.orchestrator.advantage import group_advantages, has_signal, turn_advantages

REWARDS = st.lists(st.floats(-100, 100, allow_nan=False), min_size=2, max_size=9)


def test_grpo_divides_by_the_unbiased_std():
    advantages = group_advantages([[1.0, 0.0, 0.0, 1.0]], kind="grpo")
    std = math.sqrt(4 * 0.25 / 3)
    assert advantages[0] == pytest.approx(
        [0.5 / (std + 1e-6), -0.5 / (std + 1e-6)] * 1 + [-0.5 / (std + 1e-6), 0.5 / (std + 1e-6)]
    )


def test_grpo_nostd_only_centres():
    assert group_advantages([[3.0, 0.0, 0.0]], kind="grpo_nostd")[0] == pytest.approx([2.0, -1.0, -1.0])


def test_rloo_subtracts_the_mean_of_the_others():
    assert group_advantages([[3.0, 0.0, 1.0]], kind="rloo")[0] == pytest.approx([2.5, -2.0, -0.5])


def test_errored_rollouts_enter_no_mean_and_get_zero():
    advantages = group_advantages([[4.0, 2.0, 1e9]], kind="grpo_nostd", valid=[[True, True, False]])
    assert advantages[0] == pytest.approx([1.0, -1.0, 0.0])


def test_a_nan_of_an_errored_rollout_does_no_harm():
    advantages = group_advantages([[4.0, 2.0, math.nan]], kind="rloo", valid=[[True, True, False]])
    assert advantages[0] == pytest.approx([2.0, -2.0, 0.0])


def test_a_group_of_one_has_mean_zero_and_std_one():
    for kind in ("grpo", "grpo_nostd", "rloo"):
        assert group_advantages([[0.75]], kind=kind)[0] == pytest.approx([0.75])


def test_groups_do_not_see_each_other():
    both = group_advantages([[1.0, 0.0], [9.0, 5.0]], kind="grpo_nostd")
    assert both.tolist() == [[0.5, -0.5], [2.0, -2.0]]


@pytest.mark.parametrize("spread", [0.0, 1e-12, 1e-9, 4e-7])
def test_a_near_zero_std_counts_as_equal(spread: float):
    for kind in ("grpo", "grpo_nostd", "rloo"):
        assert not group_advantages([[0.5, 0.5 + spread, 0.5]], kind=kind).any()


def test_equal_rewards_that_float_cannot_average_exactly_are_equal():
    assert not group_advantages([[0.1] * 7], kind="grpo").any()


@pytest.mark.parametrize(
    ("rewards", "kind", "valid", "words"),
    [
        ([1.0, 2.0], "grpo", None, "must both be"),
        ([[1.0, 2.0]], "grpo", [[True]], "must both be"),
        ([[1.0, math.nan]], "grpo", None, "not finite"),
        ([[1.0, 2.0]], "ppo", None, "'ppo' is unknown"),
    ],
)
def test_nonsense_is_refused_with_words(rewards: object, kind: str, valid: object, words: str):
    with pytest.raises(ValueError, match=words):
        group_advantages(rewards, kind=kind, valid=valid)  # type: ignore[arg-type]


@given(st.lists(REWARDS, min_size=1, max_size=1), st.sampled_from(["grpo", "grpo_nostd", "rloo"]))
@settings(deadline=None)
def test_advantages_of_a_group_sum_to_zero_and_are_bounded(rewards: list[list[float]], kind: str):
    advantages = group_advantages(rewards, kind=kind)  # type: ignore[arg-type]
    assert advantages.sum() == pytest.approx(0.0, abs=1e-6)
    if kind == "grpo":  # the largest z-score of n values is (n - 1) / sqrt(n)
        n = len(rewards[0])
        assert np.abs(advantages).max() <= (n - 1) / math.sqrt(n) + 1e-6


@given(REWARDS, st.floats(-50, 50), st.sampled_from(["grpo", "grpo_nostd", "rloo"]))
@settings(deadline=None)
def test_a_constant_added_to_all_rewards_changes_nothing(rewards: list[float], shift: float, kind: str):
    before = group_advantages([rewards], kind=kind)  # type: ignore[arg-type]
    if np.std(rewards) < 1e-3:  # near the threshold of equality, rounding may decide
        return
    after = group_advantages([[reward + shift for reward in rewards]], kind=kind)  # type: ignore[arg-type]
    assert after == pytest.approx(before, abs=1e-6, rel=1e-4)


@given(REWARDS)
@settings(deadline=None)
def test_rloo_is_leave_one_out(rewards: list[float]):
    if np.std(rewards) < 1e-3:
        return
    expected = [r - (sum(rewards) - r) / (len(rewards) - 1) for r in rewards]
    assert group_advantages([rewards], kind="rloo")[0] == pytest.approx(expected, abs=1e-6)


def test_turn_advantages_by_hand_with_different_turn_counts():
    # returns: [3, 2], [1], [0, 0, 4 -> 4, 4, 4]
    advantages = turn_advantages([[1.0, 2.0], [1.0], [0.0, 0.0, 4.0]])
    assert advantages[0] == pytest.approx([3 - (1 + 4) / 2, 2 - (1 + 4) / 2])
    assert advantages[1] == pytest.approx([1 - (3 + 4) / 2])
    assert advantages[2] == pytest.approx([4 - (3 + 1) / 2, 4 - (2 + 1) / 2, 4 - (2 + 1) / 2])


@given(st.lists(st.tuples(st.integers(1, 5), st.floats(-10, 10)), min_size=2, max_size=6))
@settings(deadline=None)
def test_where_only_the_outcome_pays_every_turn_gets_rloo(rollouts: list[tuple[int, float]]):
    turn_rewards = [[0.0] * (turns - 1) + [outcome] for turns, outcome in rollouts]
    outcomes = [outcome for _, outcome in rollouts]
    if np.std(outcomes) < 1e-3:
        return
    whole = group_advantages([outcomes], kind="rloo")[0]
    for advantages, value in zip(turn_advantages(turn_rewards), whole, strict=True):
        assert advantages == pytest.approx(np.full(len(advantages), value), abs=1e-9)


def test_invalid_and_empty_rollouts_enter_no_baseline():
    advantages = turn_advantages([[1.0], [3.0], [100.0], []], valid=[True, True, False, True])
    assert [a.tolist() for a in advantages] == [[-2.0], [2.0], [0.0], []]


def _episodes(p: float, q: float) -> list[tuple[list[tuple[int, int]], list[float], float]]:
    """All episodes of a process in which action 0 at the first turn ends it: ((turn, action), rewards, probability)."""
    stop = ([(0, 0)], [0.7], 1 - p)
    go_on = [([(0, 1), (1, a)], [0.2, 2.0 * a - 0.5], p * (q if a else 1 - q)) for a in (0, 1)]
    return [stop, *go_on]


def _score(steps: list[tuple[int, int]], turn: int, p: float, q: float) -> np.ndarray:
    """Gradient of log probability of the action of a turn with respect to (p, q)."""
    gradient = np.zeros(2)
    chance = (p, q)[turn]
    gradient[turn] = 1 / chance if steps[turn][1] else -1 / (1 - chance)
    return gradient


@given(st.floats(0.1, 0.9), st.floats(0.1, 0.9), st.integers(2, 3))
@settings(deadline=None, max_examples=30)
def test_the_per_turn_estimate_of_the_gradient_is_unbiased(p: float, q: float, size: int):
    """The expectation over all groups equals the gradient of the expected return, though turn counts differ."""
    episodes = _episodes(p, q)
    estimate = np.zeros(2)
    for group in itertools.product(episodes, repeat=size):
        chance = math.prod(probability for _, _, probability in group)
        advantages = turn_advantages([rewards for _, rewards, _ in group])
        for (steps, _, _), values in zip(group, advantages, strict=True):
            for turn, value in enumerate(values):
                estimate += chance * value * _score(steps, turn, p, q) / size
    # J = (1 - p) 0.7 + p (0.2 - 0.5 + 2 q)
    exact = np.array([-0.7 + 0.2 - 0.5 + 2 * q, 2 * p])
    assert estimate == pytest.approx(exact, abs=1e-9)


def test_signal_is_any_advantage_that_is_not_rounding():
    assert not has_signal([np.zeros(3), np.full(2, 1e-9)])
    assert has_signal([np.zeros(3), np.array([0.0, -1e-3])])
