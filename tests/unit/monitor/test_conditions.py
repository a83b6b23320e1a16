"""Verdicts about a run, with planted runs: learning, stuck, collapsed, noisy."""

import json
import logging
import random

import pytest

from turnwise.config import StopConfig
from turnwise.monitor import Conditions, State, Verdict
from turnwise.monitor.facts import ENTROPY, REWARD


def feed(conditions: Conditions, rewards: list[float], entropy: float = 1.0) -> list[tuple[int, Verdict]]:
    verdicts = [
        (step, conditions.update(step, {REWARD: reward, ENTROPY: entropy})) for step, reward in enumerate(rewards, start=1)
    ]
    return [(step, verdict) for step, verdict in verdicts if verdict is not None]


def test_success_is_reported_once_at_the_first_step_where_it_holds() -> None:
    conditions = Conditions(StopConfig(success_when="running_mean(total_reward) > 0.5", window=3))
    verdicts = feed(conditions, [0, 0, 0, 1, 1, 1, 0, 0, 1, 1])
    assert [(step, verdict.kind) for step, verdict in verdicts] == [(5, "success")]
    assert conditions.first_success == 5
    assert "running_mean(total_reward) > 0.5" in verdicts[0][1].reason


def test_success_may_rest_on_an_evaluation_that_comes_as_its_own_line() -> None:
    conditions = Conditions(StopConfig(success_when='latest("val-core/wordle/reward/mean") > 1 and total_reward > 0', window=2))
    assert conditions.update(0, {"val-core/wordle/reward/mean": 0.5}) is None
    assert conditions.update(1, {REWARD: 0.5}) is None
    verdict = conditions.update(1, {"val-core/wordle/reward/mean": 1.5})
    assert verdict is not None
    assert conditions.first_success == 1


def test_abort_is_reported_as_long_as_it_holds() -> None:
    conditions = Conditions(StopConfig(abort_when="running_mean(step_time) > 80", window=2))
    kinds = [conditions.update(step, {"timing/step_s": seconds}) for step, seconds in enumerate([70, 80, 90, 90, 10], start=1)]
    assert [kind and kind.kind for kind in kinds] == [None, None, "abort", "abort", None]


def test_a_run_without_progress_is_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    conditions = Conditions(StopConfig(window=2, patience=10))
    with caplog.at_level(logging.WARNING):
        assert feed(conditions, [0.0, 1.0, *[0.5] * 30]) == []
    assert [(step, text.split(":")[0]) for step, text in conditions.warnings] == [(13, "stuck")]
    assert "step 13" in caplog.text


def test_a_stuck_run_is_ended_when_asked() -> None:
    conditions = Conditions(StopConfig(window=2, patience=10, on_stuck="stop"))
    assert [(step, verdict.kind) for step, verdict in feed(conditions, [0.0, 1.0, *[0.5] * 12])] == [(13, "abort")]


def test_progress_ends_a_warning_and_the_next_standstill_is_a_new_one() -> None:
    conditions = Conditions(StopConfig(window=1, patience=5))
    feed(conditions, [0.5] * 8 + [0.6] * 8)
    assert [step for step, _ in conditions.warnings] == [6, 14]


def test_patience_can_be_switched_off() -> None:
    conditions = Conditions(StopConfig(window=1, patience=None))
    feed(conditions, [0.5] * 600)
    assert conditions.warnings == []


def test_a_reward_that_falls_after_rising_has_collapsed() -> None:
    rng = random.Random(0)
    rise = [0.02 * step + rng.gauss(0, 0.05) for step in range(50)]
    conditions = Conditions(StopConfig(window=5))
    feed(conditions, rise + [rng.gauss(0.1, 0.05) for _ in range(30)])
    assert [text.split(":")[0] for _, text in conditions.warnings] == ["collapsing"]
    assert 50 < conditions.warnings[0][0] <= 66
    assert "lower trainer.optim.lr" in conditions.warnings[0][1]
    assert conditions.learning.state is State.COLLAPSING


def test_a_collapsed_run_is_ended_when_asked() -> None:
    conditions = Conditions(StopConfig(window=2, on_stuck="stop"))
    verdicts = feed(conditions, [1.0 - 0.02 * step for step in range(60)])
    assert [verdict.kind for _, verdict in verdicts] == ["abort"]
    assert verdicts[0][1].reason.startswith("collapsing: the reward fell from")


def test_the_verdict_is_a_metric_that_conditions_may_name() -> None:
    conditions = Conditions(StopConfig(success_when="learning > 0 and latest(monitor/learning/rise) > 4"))
    feed(conditions, [0.01 * step for step in range(60)])
    assert conditions.first_success is not None
    assert 18 <= conditions.first_success <= 24


def test_a_reward_that_falls_from_where_it_started_has_collapsed_too() -> None:
    conditions = Conditions(StopConfig(window=5))
    feed(conditions, [1.0 - 0.02 * step for step in range(60)])
    assert [text.split(":")[0] for _, text in conditions.warnings] == ["collapsing"]


@pytest.mark.parametrize("seed", range(3))
def test_noise_without_a_trend_is_no_collapse(seed: int) -> None:
    rng = random.Random(seed)
    conditions = Conditions(StopConfig(window=20, patience=None))
    feed(conditions, [rng.gauss(0.5, 0.3) for _ in range(400)])
    assert conditions.warnings == []


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_learns_with_noise_raises_no_warning(seed: int) -> None:
    rng = random.Random(seed)
    conditions = Conditions(StopConfig(window=20))
    feed(conditions, [min(1.0, step / 200) + rng.gauss(0, 0.3) for step in range(300)])
    assert conditions.warnings == []


def test_entropy_near_zero_is_a_collapse() -> None:
    conditions = Conditions(StopConfig(window=3))
    feed(conditions, [0.5] * 10, entropy=0.3)
    assert conditions.warnings == []
    for step in range(11, 22):
        conditions.update(step, {REWARD: 0.5, ENTROPY: 0.001})
    assert [text.split(",")[0] for _, text in conditions.warnings] == ["collapsing: entropy fell from 0.3 to 0.001 nats a token"]


def test_a_condition_on_a_metric_that_never_comes_is_pointed_out() -> None:
    conditions = Conditions(StopConfig(success_when="running_mean(feedbak_reward) > 0", window=4))
    feed(conditions, [0.1, 0.2, 0.3, 0.4, 0.5])
    assert [(step, "reward/feedbak/mean" in text) for step, text in conditions.warnings] == [(4, True)]


def test_replay_restores_the_state_without_repeating_verdicts() -> None:
    stop = StopConfig(success_when="running_mean(total_reward) > 0.5", abort_when="total_reward < 0", window=3, patience=10)
    rewards = [0, 1, 1, 1, 0.2, -1, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]
    straight = Conditions(stop)
    feed(straight, rewards)
    resumed = Conditions(stop)
    lines = [
        json.dumps({"step": step, "time": 1.0, REWARD: reward, ENTROPY: 1.0, "actor/loss": None})
        for step, reward in enumerate(rewards[:8], 1)
    ]
    resumed.replay(lines)
    assert resumed.first_success == straight.first_success == 3
    later = [resumed.update(step, {REWARD: reward, ENTROPY: 1.0}) for step, reward in enumerate(rewards[8:], start=9)]
    assert later == [None] * 7
    assert resumed.warnings == straight.warnings != []


def test_a_collapse_that_was_told_before_a_resume_is_not_told_again() -> None:
    rewards = [1.0 - 0.02 * step for step in range(60)]
    straight, resumed = Conditions(StopConfig(window=5)), Conditions(StopConfig(window=5))
    lines: list[dict[str, float]] = []
    for step, reward in enumerate(rewards, 1):
        straight.update(step, {REWARD: reward})
        lines.append({"step": step, REWARD: reward, **straight.learning.metrics()})
    resumed.replay(lines[:50])
    assert resumed.learning.state is State.COLLAPSING
    for step, reward in enumerate(rewards[50:], start=51):
        resumed.update(step, {REWARD: reward})
    assert resumed.warnings == straight.warnings != []


def test_a_collapse_counts_once_it_has_stood_for_a_window() -> None:
    for window in (4, 9):
        conditions = Conditions(StopConfig(window=window))
        feed(conditions, [1.0 - 0.02 * step for step in range(60)])
        assert [step for step, _ in conditions.warnings] == [17 + window]
