"""The verdict on planted runs: each state with its reason, and that noise alone is neither learning nor collapse."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from turnwise.monitor.learning import CODES, Learning, LearningWatch, State, judge_metrics

Curve = Callable[[int], float]  # of the step, 1 and up
HEALTHY: dict[str, Curve] = {
    "critic/reward/std": lambda _: 0.4,
    "critic/reward/max": lambda _: 1.0,
    "critic/reward/min": lambda _: 0.0,
    "groups/equal_reward/share": lambda _: 0.25,
    "rollouts/common_reply/share": lambda _: 0.1,
    "actor/loss": lambda _: 0.01,
    "actor/grad_norm": lambda step: 0.4 + 0.2 * math.sin(step),
    "actor/grad_clipped/share": lambda _: 0.0,
    "actor/update_norm": lambda _: 0.01,
    "actor/update_ratio": lambda _: 1e-4,
    "actor/published_change/share": lambda _: 0.7,
    "actor/rewarded_logprob_change": lambda step: 0.002 + 0.001 * math.sin(3 * step),
    "actor/lr": lambda _: 1e-5,
    "actor/entropy": lambda _: 1.1,
    "actor/kl": lambda _: 0.002,
    "mismatch/kl/mean": lambda _: 1e-4,
}


def planted(
    reward: Curve, steps: int = 120, *, noise: float = 0.05, seed: int = 0, **other: Curve
) -> dict[int, dict[str, float]]:
    """A run by step. Names of `other` curves have `__` for a slash."""
    rng = np.random.default_rng(seed)
    curves = HEALTHY | {name.replace("__", "/"): curve for name, curve in other.items()}
    return {
        step: {"critic/reward/mean": reward(step) + noise * rng.standard_normal()}
        | {n: curve(step) for n, curve in curves.items()}
        for step in range(1, steps + 1)
    }


def held_out(reward: float, error: float = 0.03, rollouts: float | None = None) -> dict[str, float]:
    found = {"val-core/wordle/reward/mean": reward, "val-core/wordle/reward/stderr": error}
    return found if rollouts is None else found | {"val-aux/wordle/rollouts/count": rollouts}


def verdict(run: Mapping[int, Mapping[str, float]], *fragments: str) -> Learning:
    """The verdict; its reason has these fragments."""
    found = judge_metrics(run)
    for fragment in fragments:
        assert fragment in found.reason, found
    return found


def test_noise_that_drowns_the_policy_is_named_and_not_taken_for_a_fault_of_the_engine() -> None:
    curves: dict[str, Curve] = {"mismatch__kl__mean": lambda step: 0.003 if step < 80 else 1.4}
    noisy: dict[str, Curve] = {**curves, "noise__sigma": lambda step: 0.0 if step < 80 else 0.05}
    found = verdict(planted(lambda step: 0.2, **noisy), "noise of sigma 0.05", "1.4 nats a token")
    assert found.state is State.COLLAPSING
    assert "inference.noise.sigma_start" in found.remedy
    verdict(planted(lambda step: 0.2, **curves), "engine and trainer disagree")


def test_a_reward_that_rises_is_learning_and_the_reason_says_from_where_to_where() -> None:
    found = verdict(planted(lambda step: 0.2 + 0.4 * step / 120), "the reward rose from 0.2", "(steps 1 to ", "standard errors")
    assert found.state is State.LEARNING
    assert found.metrics()["monitor/learning/state"] == 1
    assert found.metrics()["monitor/learning/rise"] > 4
    assert "no further rise" not in found.reason


@pytest.mark.parametrize("learned_by", [20, 60, 105])
def test_a_jump_is_no_noise(learned_by: int) -> None:
    found = verdict(planted(lambda step: 0.2 if step < learned_by else 0.7), "the reward rose from")
    assert found.state is State.LEARNING


def test_a_run_that_stays_where_it_has_risen_to_has_learned_and_the_standstill_is_told() -> None:
    found = verdict(planted(lambda step: min(0.7, 0.2 + step / 60)), "no further rise since step 61")
    assert found.state is State.LEARNING


def test_a_constant_reward_is_no_signal() -> None:
    equal: dict[str, Curve] = {"groups__equal_reward__share": lambda _: 1.0, "actor__grad_norm": lambda _: 0.0}
    equal |= {"critic__reward__std": lambda _: 0.0, "critic__reward__max": lambda _: 0.5, "critic__reward__min": lambda _: 0.5}
    found = verdict(
        planted(lambda _: 0.5, 30, noise=0, **equal), "gradient was 0 in 7 of the last 7 steps", "the same reward, 0.5"
    )
    assert found.state is State.NO_SIGNAL
    assert "rollouts_per_example" in found.remedy
    assert found.metrics()["monitor/learning/state"] == -2


def test_no_signal_is_said_after_five_steps() -> None:
    run = planted(lambda _: 0.0, 5, noise=0, groups__equal_reward__share=lambda _: 1.0)
    assert verdict(run, "100% of the groups").state is State.NO_SIGNAL
    assert verdict({step: run[step] for step in (1, 2, 3, 4)}, "4 steps").state is State.TOO_EARLY


def test_equal_sums_over_turns_that_differ_are_a_signal() -> None:
    run = planted(lambda _: 0.5, 60, critic__reward__std=lambda _: 0.0)
    assert verdict(run).state is not State.NO_SIGNAL


def test_a_learning_rate_of_zero_is_no_signal() -> None:
    run = planted(lambda _: 0.5, actor__lr=lambda _: 0.0, actor__update_norm=lambda _: 0.0)
    found = verdict(run, "the weights did not move in 20 of the last 20 steps", "learning rate of 0")
    assert found.state is State.NO_SIGNAL
    assert "trainer.optim.lr" in found.remedy


def test_updates_that_are_lost_in_rounding_are_no_signal() -> None:
    run = planted(lambda _: 0.5, actor__published_change__share=lambda _: 0.0, actor__update_ratio=lambda _: 1e-8)
    assert verdict(run, "none of the weights that engines read changed", "1e-08 of their norm").state is State.NO_SIGNAL


def test_a_reward_that_falls_from_its_start_is_collapsing() -> None:
    found = verdict(planted(lambda step: 0.6 - 0.4 * step / 120), "the reward fell from 0.5", "standard errors")
    assert found.state is State.COLLAPSING
    assert "checkpoint" in found.remedy


def test_a_reward_that_rises_and_falls_back_is_collapsing_and_half_of_a_gain_is_still_learning() -> None:
    def back_to(level: float) -> Curve:
        return lambda step: 0.2 + step / 120 if step <= 60 else max(level, 0.7 - (step - 60) / 60)

    assert verdict(planted(back_to(0.25)), "the reward fell from 0.6").state is State.COLLAPSING
    assert verdict(planted(back_to(0.6))).state is State.LEARNING


def test_a_fall_is_seen_soon_after_it_began() -> None:
    run = planted(lambda step: 0.2 + 0.5 * min(1, step / 100) if step <= 200 else 0.1, 300)
    states = {step: judge_metrics({s: run[s] for s in range(1, step + 1)}).state for step in range(190, 260)}
    assert states[200] is State.LEARNING
    assert min(step for step, state in states.items() if state is State.COLLAPSING) <= 235


def test_a_fall_too_small_to_matter_is_no_collapse() -> None:
    """Beyond noise, but a tenth of what single rewards differ by."""
    run = planted(lambda step: 0.5 if step < 200 else 0.46, 400, noise=0.01)
    assert verdict(run).state is State.FLAT
    assert verdict({s: m | {"critic/reward/std": 0.05} for s, m in run.items()}).state is State.COLLAPSING


def test_replies_that_become_one_are_a_collapse_even_where_the_reward_rose() -> None:
    common: dict[str, Curve] = {"rollouts__common_reply__share": lambda step: min(0.97, 0.1 + step / 60)}
    found = verdict(planted(lambda step: min(0.5, step / 100), **common), "97% of the replies", "against")
    assert found.state is State.COLLAPSING
    always_one = planted(lambda step: min(0.5, step / 100), rollouts__common_reply__share=lambda _: 0.97)
    assert verdict(always_one).state is State.LEARNING
    best = planted(lambda step: min(1.0, step / 60), noise=0.001, **common)
    assert verdict(best).state is State.LEARNING


def test_entropy_that_is_gone_without_a_gain_is_a_collapse() -> None:
    entropy: dict[str, Curve] = {"actor__entropy": lambda step: 1.1 * math.exp(-step / 10)}
    assert verdict(planted(lambda _: 0.3, **entropy), "entropy fell from", "nats a token").state is State.COLLAPSING
    assert (
        verdict(planted(lambda step: 0.2 + step / 200, **entropy), "the reward rose", "now entropy fell").state is State.LEARNING
    )
    assert verdict(planted(lambda _: 0.3, actor__entropy=lambda _: 0.01)).state is State.FLAT


@pytest.mark.parametrize("as_null", [False, True])
def test_numbers_that_are_not_finite_are_a_collapse(as_null: bool) -> None:
    run = planted(lambda step: 0.2 + step / 300, 40)
    for step in range(36, 41):
        run[step] |= {"actor/loss": math.nan, "actor/grad_norm": math.nan}
        if as_null:  # as readers of metrics.jsonl see it
            run[step] = {n: v for n, v in run[step].items() if not math.isnan(v)} | {"monitor/nonfinite/count": 2.0}
    assert verdict(run, "NaN or infinite in 5 of the last 10 steps").state is State.COLLAPSING


def test_one_value_that_is_not_finite_is_nothing() -> None:
    run = planted(lambda step: 0.2 + step / 200)
    run[120] |= {"actor/grad_norm": math.inf, "critic/reward/mean": math.nan}
    assert verdict(run).state is State.LEARNING


@pytest.mark.parametrize(
    ("curves", "told"),
    [
        ({"mismatch__kl__mean": lambda step: 1e-4 if step < 80 else 2.0}, "engine and trainer disagree"),
        ({"actor__kl": lambda step: 1e-3 if step < 80 else 2.0}, "moved away from the one that sampled"),
        ({"actor__grad_norm": lambda step: 0.3 if step < 100 else 90.0}, "grew 300-fold"),
    ],
)
def test_what_blows_up_is_a_collapse(curves: dict[str, Curve], told: str) -> None:
    assert verdict(planted(lambda _: 0.5, **curves), told).state is State.COLLAPSING


@pytest.mark.parametrize(
    ("curves", "told", "remedy"),
    [
        ({}, "a rise of 0.0", "no probe says why"),
        ({"groups__equal_reward__share": lambda _: 0.8}, "80% of the groups have equal rewards", "dynamic_sampling"),
        ({"critic__reward__max": lambda _: 0.66}, "at its ceiling, no rollout got more than 0.66", "harder tasks"),
        ({"actor__published_change__share": lambda _: 0.0004}, "0.04% of the weights that engines read", "trainer.optim.lr"),
        ({"actor__update_ratio": lambda _: 2e-8}, "a step moves the weights by 2e-08 of their norm", "trainer.optim.lr"),
        ({"actor__update_ratio": lambda _: 0.2}, "by 20% of their norm", "lower trainer.optim.lr"),
        ({"actor__grad_clipped__share": lambda _: 0.98}, "clipping leaves 2.0%", "max_grad_norm"),
        (
            {"actor__rewarded_logprob_change": lambda s: -2e-3 + 1e-3 * math.sin(s)},
            "what was rewarded less likely",
            "turnwise check",
        ),
    ],
)
def test_a_run_that_starts_at_065_and_stays_there_is_flat_and_the_reason_says_why(
    curves: dict[str, Curve], told: str, remedy: str
) -> None:
    found = verdict(planted(lambda _: 0.65, **curves), "the reward was 0.6", "over the first third of 120 steps", told)
    assert found.state is State.FLAT
    assert remedy in found.remedy


def test_flat_is_said_only_once_a_rise_worth_having_would_have_shown() -> None:
    quiet, loud = planted(lambda _: 0.65, 40, noise=0.05), planted(lambda _: 0.65, 40, noise=0.4)
    assert verdict(quiet).state is State.FLAT
    assert verdict(loud, "40 steps so far, in which only a rise of").state is State.TOO_EARLY
    assert verdict(loud).metrics().keys() == {"monitor/learning/rise"}


def test_evaluations_alone_are_judged_too() -> None:
    assert verdict({}, "no step so far").state is State.TOO_EARLY
    assert verdict({0: held_out(0.3)}).state is State.TOO_EARLY
    assert verdict({0: held_out(0.3), 100: held_out(0.5)}, "from 0.3 at step 0 to 0.5 at step 100 (+4.7").state is State.LEARNING
    assert verdict({0: held_out(0.3), 100: held_out(0.35)}, "not changed beyond chance").state is State.FLAT
    fell = {0: held_out(0.3), 50: held_out(0.6), 100: held_out(0.35)}
    assert verdict(fell, "fell from 0.6 at step 50 to 0.35 at step 100").state is State.COLLAPSING


def test_held_out_rewards_count_more_than_training_rewards() -> None:
    rising, falling = planted(lambda step: 0.2 + step / 200), planted(lambda step: 0.8 - step / 200)
    flat = planted(lambda _: 0.5)
    gained, lost = {0: held_out(0.2), 120: held_out(0.5)}, {0: held_out(0.5), 120: held_out(0.2)}

    def both(run: dict[int, dict[str, float]], evaluations: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
        return {step: run.get(step, {}) | evaluations.get(step, {}) for step in {**evaluations, **run}}

    assert verdict(both(flat, gained), "the held-out reward rose").state is State.LEARNING
    assert verdict(both(falling, gained)).state is State.LEARNING
    assert verdict(both(rising, lost), "the held-out reward fell").state is State.COLLAPSING
    unmoved = {0: held_out(0.3), 120: held_out(0.32)}
    assert verdict(both(rising, unmoved), "the reward rose", "held-out reward has not changed").state is State.LEARNING
    early = {0: held_out(0.2), 10: held_out(0.5)}
    assert verdict(both(falling, early), "the reward fell").state is State.COLLAPSING


@pytest.mark.parametrize(("rollouts", "state"), [(None, State.FLAT), (2.0, State.FLAT), (64.0, State.LEARNING)])
def test_evaluations_without_spread_prove_a_rise_only_by_their_number(rollouts: float | None, state: State) -> None:
    assert judge_metrics({0: held_out(0.0, 0.0, rollouts), 100: held_out(1.0, 0.0, rollouts)}).state is state


def test_the_mean_over_environments_is_compared_where_all_of_them_were_evaluated() -> None:
    def two(wordle: float, gsm8k: float) -> dict[str, float]:
        return held_out(wordle) | {"val-core/gsm8k/reward/mean": gsm8k, "val-core/gsm8k/reward/stderr": 0.03}

    run = {0: two(0.2, 0.4), 50: held_out(0.9), 100: two(0.4, 0.6)}
    assert verdict(run, "from 0.3 at step 0 to 0.5 at step 100 (+6.7").state is State.LEARNING


def test_a_resumed_run_is_judged_by_the_steps_that_survived() -> None:
    abandoned, kept = planted(lambda step: 0.2 + step / 200, 60), planted(lambda _: 0.3, 60, seed=1)
    watch = LearningWatch()
    for step in range(1, 61):
        watch.record(step, abandoned[step])
    assert watch.verdict.state is State.LEARNING
    for step in range(11, 61):
        watch.record(step, kept[step])
    straight = LearningWatch()
    for step in range(1, 61):
        straight.record(step, abandoned[step] if step <= 10 else kept[step])
    assert watch.verdict == straight.verdict
    assert watch.verdict.state is State.FLAT


def test_a_step_may_come_in_parts() -> None:
    run = planted(lambda step: 0.2 + step / 200)
    watch = LearningWatch()
    for step, values in run.items():
        for name, value in values.items():
            watch.record(step, {name: value})
    assert watch.verdict == judge_metrics(run)


def test_all_states_but_too_early_have_a_number_of_their_own() -> None:
    assert set(CODES) == set(State) - {State.TOO_EARLY}
    assert len(set(CODES.values())) == len(CODES)
