"""Parts of the probe by themselves: which samples, what tokens weigh, how long a step must be to be judged."""

import random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.batches import make_batch, make_sample
from turnwise.config import LossConfig
from turnwise.diagnose.probe_report import Counted, Rewarded
from turnwise.diagnose.probing.agreement import agreement, scanned_temperatures
from turnwise.diagnose.probing.rewarded import LARGEST, LONG, better_factor
from turnwise.diagnose.probing.subset import choose_samples, part_of
from turnwise.diagnose.probing.tokens import Tokens, loss_weights
from turnwise.trainer.loss import StepTotals, policy_loss
from turnwise.transport import Sample


def samples_with(advantages: list[float], *, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    return [make_sample(rng, rollout=f"r{i}", advantage=advantage) for i, advantage in enumerate(advantages)]


@given(
    advantages=st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.5, 2.0]), min_size=1, max_size=30),
    tokens=st.integers(0, 400),
    most=st.integers(2, 12),
)
def test_samples_are_of_both_signs_in_order_and_within_the_budget(advantages: list[float], tokens: int, most: int) -> None:
    samples = samples_with(advantages)
    if not any(advantages):
        with pytest.raises(ValueError, match="no sample of the batch has an advantage"):
            choose_samples(samples, tokens=tokens, most=most)
        return
    chosen = choose_samples(samples, tokens=tokens, most=most)
    places = [samples.index(sample) for sample in chosen]
    assert places == sorted(set(places))
    assert {advantages[place] > 0 for place in places} == {advantage > 0 for advantage in advantages if advantage}
    assert all(advantages[place] for place in places)
    assert len(chosen) <= most
    assert sum(len(sample.token_ids) for sample in chosen) <= tokens or len(chosen) <= 2


def test_a_part_of_a_batch_accounts_for_its_own_rollouts() -> None:
    batch = make_batch(1)
    part = part_of(batch, batch.samples[1:3])
    assert part.rollout_ids == [sample.rollout_id for sample in batch.samples[1:3]]
    assert (part.num_rollouts, part.step, part.temperature) == (2, 1, batch.temperature)


@pytest.mark.parametrize("kind", ["grpo", "gspo", "dapo", "cispo", "dr_grpo"])
def test_tokens_weigh_what_they_weigh_in_the_loss(kind: Any) -> None:
    """At a ratio of 1 the slope of the loss is minus weight times advantage; one rollout of the three is two samples."""
    lengths = [4, 2, 3, 5]
    rollouts = torch.tensor([4, 5, 5, 5])
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    logprobs = torch.full((14,), -1.5, dtype=torch.float64, requires_grad=True)
    advantages = torch.linspace(-1, 2, 14, dtype=torch.float64)
    config = LossConfig(kind=kind, clip_high=2.0, max_completion_tokens=40)
    output = policy_loss(
        logprobs,
        logprobs.detach(),
        advantages,
        torch.ones(14, dtype=torch.bool),
        config=config,
        segment_ids=segments,
        totals=StepTotals(14, 3),
        rollout_tokens=rollouts,
    )
    (slope,) = torch.autograd.grad(output.loss, logprobs)
    tokens = Tokens(np.zeros(14), advantages.numpy(), segments.numpy(), rollouts[segments].double().numpy())
    weights = loss_weights(tokens, kind=kind, max_completion_tokens=40)
    if kind == "gspo":  # the ratio of a sample is shared by its tokens, and so is its slope
        per_sample = torch.zeros(4, dtype=torch.float64).index_add(0, segments, slope)
        expected = [float(np.sum((weights * tokens.advantages)[tokens.samples == i])) for i in range(4)]
        assert (-per_sample).tolist() == pytest.approx(expected)
    else:
        assert (-slope).tolist() == pytest.approx(list(weights * tokens.advantages))


def effect(**changes: Any) -> Rewarded:
    found = Rewarded(
        predicted=0.02,
        observed=0.02,
        noise=1e-5,
        scale=1.0,
        positive=0.1,
        negative=-0.1,
        positives=9,
        negatives=9,
        change=0.1,
        kl=0.01,
    )
    return msgspec.structs.replace(found, **changes)


ALL_CHANGE = [Counted(1, 1000), Counted(10, 1000), Counted(100, 1000)]


def test_a_step_that_shows_is_judged_as_it_is() -> None:
    assert better_factor(effect(), 1e-5, ALL_CHANGE) == 1.0


def test_a_step_within_rounding_is_made_longer_by_a_power_of_ten_and_not_beyond_what_is_linear() -> None:
    small = effect(predicted=1e-6, noise=1e-6)
    factor = better_factor(small, 0.0, ALL_CHANGE)
    assert factor == 10.0
    assert factor * small.predicted >= LONG * small.noise
    assert better_factor(effect(predicted=1e-3, noise=0.0), 0.005, ALL_CHANGE) == 10.0  # a single token must show, too
    assert better_factor(effect(predicted=1e-4, noise=1.0), 0.0, ALL_CHANGE) == pytest.approx(LARGEST / 1e-4)
    assert better_factor(effect(predicted=0.5, noise=1.0), 0.0, ALL_CHANGE) == 1.0


def test_a_step_that_most_weights_do_not_take_is_made_longer() -> None:
    published = [Counted(1, 20), Counted(10, 160), Counted(100, 880), Counted(1000, 1000)]
    assert better_factor(effect(predicted=1e-4), 1e-6, published) == 100.0
    assert better_factor(effect(predicted=1e-4), 1e-6, [Counted(1, 0), Counted(10, 0)]) == 1.0


def test_a_step_that_went_the_wrong_way_is_made_shorter_once() -> None:
    assert better_factor(effect(predicted=0.5, observed=-0.3), 1e-5, ALL_CHANGE) == pytest.approx(0.02)
    assert better_factor(effect(predicted=-0.5, observed=-0.3), 1e-5, ALL_CHANGE) == 1.0


def test_agreement_is_that_of_the_formulas() -> None:
    a, b = np.array([-1.0, -2.0, -0.5]), np.array([-1.1, -1.8, -0.5])
    found = agreement(a, b)
    assert (found.mean, found.largest, found.bias) == pytest.approx((0.1, 0.2, -1 / 30))
    assert found.kl == pytest.approx(np.mean(np.exp(a - b) - (a - b) - 1))
    assert found.correlation == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_temperatures_that_a_mistake_would_make_are_among_those_looked_at() -> None:
    assert {0.8, 0.64, 1.25, 1.0} <= set(scanned_temperatures(0.8))
    assert scanned_temperatures(1.0).count(1.0) == 1
