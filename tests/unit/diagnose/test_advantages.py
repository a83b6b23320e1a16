"""Do advantages say what the rewards say?"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support.hand_made import context_of
from support.rollouts import echo_setup, make_group, make_rollout
from turnwise.config import AdvantageConfig
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Finding, Verdict
from turnwise.diagnose.text_checks.advantages import ADVANTAGES, expected_advantages
from turnwise.orchestrator.advantage import FloatArray
from turnwise.orchestrator.buffer import GroupTask
from turnwise.orchestrator.filters import FinishedGroup, JudgedGroup, judge

KINDS = ["grpo", "grpo_nostd", "rloo"]
rewards = st.floats(-3, 3).map(lambda value: round(value, 3))
turns = st.lists(rewards, min_size=1, max_size=4)


def group_of(turn_rewards: Sequence[Sequence[float]], number: int = 0) -> FinishedGroup:
    env = echo_setup()
    rollouts = tuple(make_rollout(turn_rewards=values, group=number, index=i) for i, values in enumerate(turn_rewards))
    return FinishedGroup(number, GroupTask(env, 0, env.tasks[0], 0), rollouts)


def changed(context: Context, change: Callable[[FloatArray], FloatArray]) -> Finding:
    """The finding after the advantages of all groups, and not those of the samples, were changed."""
    context.groups = [
        JudgedGroup(judged.group, [change(values) for values in judged.advantages], judged.fate) for judged in context.groups
    ]
    return ADVANTAGES.run(context)


@settings(deadline=None)
@given(st.lists(turns, min_size=2, max_size=6), st.sampled_from(KINDS), st.booleans())
def test_the_formulas_agree_with_those_of_a_run(turn_rewards: list[list[float]], kind: Any, per_turn: bool):
    config = AdvantageConfig(kind=kind, per_turn=per_turn)
    group = group_of(turn_rewards)
    ours, theirs = expected_advantages(group.rollouts, config), judge(group, config, oldest_allowed=0).advantages
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_turn", [False, True])
def test_right_advantages_pass(kind: str, per_turn: bool, tmp_path: Path):
    groups = [group_of([[1.0, 0.0], [0.0, 0.5], [0.25]], 0), group_of([[0.5], [1.0, 1.0]], 1)]
    context = context_of(groups, tmp_path, advantage={"kind": kind, "per_turn": per_turn})
    found = ADVANTAGES.run(context)
    assert found.verdict is Verdict.PASS, found.evidence
    assert "2 groups recomputed" in found.evidence
    assert found.data["difference"] < 1e-12


@settings(deadline=None)
@given(turn_rewards=st.lists(turns, min_size=2, max_size=6), kind=st.sampled_from(KINDS), per_turn=st.booleans())
@example(turn_rewards=[[10.0, -8.0], [-30.0, 20.0]], kind="grpo", per_turn=False)  # the later turn alone would say otherwise
def test_advantages_of_a_run_never_count_as_running_against_the_rewards(
    turn_rewards: list[list[float]], kind: str, per_turn: bool, tmp_path_factory: pytest.TempPathFactory
):
    advantage = {"kind": kind, "per_turn": per_turn}
    context = context_of(
        [group_of(turn_rewards), group_of([[1.0], [0.0]], 1)], tmp_path_factory.getbasetemp(), advantage=advantage
    )
    assert "against the rewards" not in ADVANTAGES.run(context).evidence


@pytest.mark.parametrize("per_turn", [False, True])
def test_a_flipped_sign_is_told_with_the_best_and_the_worst_paid(per_turn: bool, tmp_path: Path):
    context = context_of([make_group([1.0, 0.0, 0.25])], tmp_path, advantage={"per_turn": per_turn, "kind": "grpo_nostd"})
    found = changed(context, lambda values: -values)
    assert found.verdict is Verdict.FAIL
    assert "in 1 of 1 groups advantages run against the rewards (group 0: reward 1 has -0." in found.evidence
    assert "what was paid least would be reinforced" in found.evidence


def test_advantages_of_another_size_fail(tmp_path: Path):
    found = changed(context_of([make_group([1.0, 0.0])], tmp_path), lambda values: values * 0.5)
    assert found.verdict is Verdict.FAIL
    assert "g0-0, turn 0: 0.3536 instead of 0.7071" in found.evidence


def test_advantages_that_do_not_sum_to_zero_fail(tmp_path: Path):
    found = changed(context_of([make_group([1.0, 0.0])], tmp_path), lambda values: values + 0.1)
    assert "advantages of group 0 sum to 0.2 instead of 0" in found.evidence


def test_a_tiny_spread_that_is_blown_up_is_a_warning(tmp_path: Path):
    groups = [make_group([1.0, 0.0], number=0), make_group([0.5, 0.5001], number=1)]
    found = ADVANTAGES.run(context_of(groups, tmp_path))
    assert found.verdict is Verdict.WARN
    assert "1 of 2 groups differ in their rewards by next to nothing (std 7.1e-05)" in found.evidence
    assert "grpo_nostd" in found.remedy
    assert ADVANTAGES.run(context_of(groups, tmp_path, advantage={"kind": "rloo"})).verdict is Verdict.PASS


def test_an_advantage_beyond_what_a_group_can_have_fails(tmp_path: Path):
    found = changed(context_of([make_group([1.0, 0.0])], tmp_path), lambda values: values * 4000)
    assert "an advantage of 2.83e+03 is beyond what groups of this size allow (0.707)" in found.evidence


def test_samples_with_other_advantages_than_their_groups_fail(tmp_path: Path):
    context = context_of([make_group([1.0, 0.0])], tmp_path)
    doubled = [msgspec.structs.replace(s, advantages=[2 * value for value in s.advantages]) for s in context.batch.samples]
    context.batch = msgspec.structs.replace(context.batch, samples=doubled)
    found = ADVANTAGES.run(context)
    assert found.verdict is Verdict.FAIL
    assert "the samples of g0-0 carry the advantages 1.414, and its group gave it 0.7071" in found.evidence


def test_errored_rollouts_have_no_advantage(tmp_path: Path):
    group = make_group([1.0, 0.0, 0.5])
    group = replace(group, rollouts=(*group.rollouts[:2], replace(group.rollouts[2], error="boom")))
    assert expected_advantages(group.rollouts, AdvantageConfig())[2] == [0.0]
    assert ADVANTAGES.run(context_of([group], tmp_path)).verdict is Verdict.PASS
