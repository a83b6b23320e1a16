"""Is there anything in the reward to learn from?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from support.hand_made import context_of
from support.rollouts import echo_setup, make_group, make_rollout
from turnwise.diagnose.core import Finding, Verdict
from turnwise.diagnose.text_checks.reward import REWARD, measured
from turnwise.orchestrator.environments import EnvSetup
from turnwise.orchestrator.filters import FinishedGroup


def paid(components: Sequence[Mapping[str, float]], number: int = 0, setup: EnvSetup | None = None) -> FinishedGroup:
    """A group whose rollouts of one turn earned these components."""
    env = setup or echo_setup()
    group = make_group([0.0] * len(components), number=number, setup=env)
    rollouts = []
    for rollout, earned in zip(group.rollouts, components, strict=True):
        reward, dense, sparse = env.totals(earned)
        turn = replace(rollout.turns[0], components=dict(earned), reward=reward)
        rollouts.append(replace(rollout, turns=(turn,), reward=reward, reward_dense=dense, reward_sparse=sparse))
    return replace(group, rollouts=tuple(rollouts))


def judged(groups: Sequence[FinishedGroup], folder: Path, **settings: object) -> Finding:
    setups = [groups[0].task.env]
    return REWARD.run(context_of(groups, folder, setups=setups, batch=False, **settings))


def test_rewards_that_differ_pass_with_the_share_and_the_range(tmp_path: Path):
    groups = [paid([{"win": 1.0}, {"win": 0.0, "length": 0.25}], 0), paid([{"win": 1.0}, {"win": 1.0}], 1)]
    found = judged(groups, tmp_path)
    assert found.verdict is Verdict.PASS
    assert "differ inside 1 of 2 groups; mean 0.812, from 0.25 to 1" in found.evidence
    assert (found.data["groups"], found.data["with_variance"]) == (2, 1)


def test_a_constant_reward_fails_with_what_it_is_made_of(tmp_path: Path):
    groups = [paid([{"win": 0.5, "length": 0.15}] * 2, number) for number in range(3)]
    found = judged(groups, tmp_path)
    assert found.verdict is Verdict.FAIL
    assert "all 6 rollouts of Echo have the reward 0.65 (length 0.15, win 0.5): it starts there and cannot move" in found.evidence
    assert "tasks that are neither always nor never solved" in found.remedy


def test_a_reward_that_depends_on_the_task_alone_fails(tmp_path: Path):
    found = judged([paid([{"win": float(number)}] * 2, number) for number in range(2)], tmp_path)
    assert found.verdict is Verdict.FAIL
    assert "differ between tasks (from 0 to 1) and in none of 2 groups of one task" in found.evidence


def test_few_groups_with_differences_are_a_warning_that_says_where_the_others_stand(tmp_path: Path):
    groups = [paid([{"win": 1.0}] * 2, 0), *(paid([{"win": 0.0}] * 2, n) for n in range(1, 5)), paid([{"win": 1.0}, {}], 5)]
    found = judged(groups, tmp_path)
    assert found.verdict is Verdict.WARN
    assert "only 1 of 6 groups" in found.evidence
    assert "4 stand at the lowest reward seen (0) and 1 at the highest (1)" in found.evidence


def test_a_reward_that_only_pays_form_is_a_warning(tmp_path: Path):
    found = judged([paid([{"length": 0.1, "win": 0.0}, {"length": 0.3, "win": 0.0}])], tmp_path)
    assert found.verdict is Verdict.WARN
    assert "the outcome of Echo (win) hardly differs inside any group: what differs is length 100%" in found.evidence


def test_a_sparse_reward_without_differences_names_the_mode_that_has_some(tmp_path: Path):
    setup = echo_setup(reward={"mode": "sparse"})
    found = judged([paid([{"length": 0.1}, {"length": 0.3}], setup=setup)], tmp_path)
    assert found.verdict is Verdict.FAIL
    assert 'reward.mode = "dense", under which rewards do differ' in found.remedy


def test_replies_that_are_all_the_same_ask_for_a_higher_temperature(tmp_path: Path):
    found = judged([paid([{"win": 0.0}] * 2)], tmp_path)
    assert "a higher orchestrator.sampling.temperature, since all replies to a task are the same" in found.remedy


def test_turns_that_differ_under_equal_totals_count_where_credit_is_by_turns(tmp_path: Path):
    group = make_group([0.0, 0.0])
    early, late = (make_rollout(turn_rewards=rewards, index=i) for i, rewards in enumerate(([1.0, 0.0], [0.0, 1.0])))
    group = replace(group, rollouts=(early, late))
    assert judged([group], tmp_path, advantage={"per_turn": True}).data["with_variance"] == 1
    assert judged([group], tmp_path).verdict is Verdict.FAIL


def test_a_reward_that_its_components_do_not_make_fails(tmp_path: Path):
    group = paid([{"win": 1.0}, {"win": 0.0}])
    wrong = replace(group.rollouts[0], reward=0.5)
    found = judged([replace(group, rollouts=(wrong, group.rollouts[1]))], tmp_path)
    assert found.verdict is Verdict.FAIL
    assert "was paid 0.5, and its components come to 1" in found.evidence


def test_errored_rollouts_take_no_part(tmp_path: Path):
    group = paid([{"win": 1.0}, {"win": 1.0}])
    broken = make_rollout(-5.0, index=2, error="boom")
    assert judged([replace(group, rollouts=(*group.rollouts, broken))], tmp_path).verdict is Verdict.FAIL


def test_the_table_has_a_line_for_every_declared_component(tmp_path: Path):
    found = judged([paid([{"win": 1.0}, {"win": 0.0}])], tmp_path)
    assert [line.split()[0].rstrip("*") for line in found.lines] == ["component", "win", "length", "owed", ""]
    assert found.lines[1].endswith("100%")


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.fixed_dictionaries({"win": st.floats(-2, 2), "length": st.floats(-2, 2)}), min_size=2, max_size=5),
        min_size=1,
        max_size=5,
    )
)
def test_shares_of_the_variance_sum_to_one(rows: list[list[dict[str, float]]]):
    setup = echo_setup(reward={"weights": {"length": 0.5}})
    groups = [paid(components, number, setup) for number, components in enumerate(rows)]
    assume(max(max(r.reward for r in g.rollouts) - min(r.reward for r in g.rollouts) for g in groups) > 1e-3)
    assert sum(component.share for component in measured(setup, groups)) == pytest.approx(1.0, abs=1e-6)
