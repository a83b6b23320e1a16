"""The statistics behind the verdict: what counts as noise, as a rise and as a fall, and how rarely noise alone does."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from turnwise.monitor.trend import FEWEST, FloatArray, Trend, errors_needed, long_run_deviation, trend


def judged(values: FloatArray, **limits: float) -> Trend:
    found = trend(range(1, len(values) + 1), values.tolist(), **limits)
    assert found is not None
    return found


def ar1(rng: np.random.Generator, size: int, memory: float) -> FloatArray:
    noise = rng.standard_normal(size)
    noise[0] /= math.sqrt(1 - memory**2)
    for at in range(1, size):
        noise[at] += memory * noise[at - 1]
    return noise * math.sqrt(1 - memory**2)


def test_of_a_few_values_nothing_is_said() -> None:
    assert trend(range(FEWEST - 1), [float(value) for value in range(FEWEST - 1)]) is None
    assert trend(range(FEWEST), [float(value) for value in range(FEWEST)]) is not None


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.7])
def test_noise_is_measured_as_the_error_of_its_means_shows_it(memory: float) -> None:
    """An AR(1) process has the long-run variance (1 + m) / (1 - m); the largest of several estimates is above it."""
    rng = np.random.default_rng(0)
    true = math.sqrt((1 + memory) / (1 - memory))
    measured = [long_run_deviation(ar1(rng, 400, memory)) / true for _ in range(40)]
    assert 0.95 < float(np.median(measured)) < 1.35
    assert min(measured) > 0.6


@pytest.mark.parametrize(
    "shape",
    [np.linspace(0, 9, 120), np.where(np.arange(120) < 47, 0.0, 9.0), np.minimum(9.0, np.arange(120) / 5)],
    ids=["steady", "jump", "saturating"],
)
def test_a_rise_hardly_counts_as_noise(shape: FloatArray) -> None:
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(120)
    assert long_run_deviation(noise + shape) < 1.7 * long_run_deviation(noise)
    assert judged(noise + shape).rose


def test_the_windows_of_a_jump_are_those_on_either_side() -> None:
    found = judged(np.where(np.arange(90) < 30, 1.0, 3.0))
    assert (found.rise.before, found.rise.after, found.rise.difference) == (1.0, 3.0, 2.0)
    assert found.rise.steps_before == (1, 30)
    assert found.rise.steps_after == (61, 90)
    assert (found.first, found.last) == (1.0, 3.0)
    assert found.rose
    assert not found.fell
    assert found.fall is None


def test_constant_values_neither_rise_nor_fall() -> None:
    found = judged(np.full(50, 0.1))
    assert (found.rose, found.fell, found.noise, found.rise.errors) == (False, False, 0.0, 0.0)


def test_a_change_that_was_not_there_a_few_values_ago_is_not_yet_one() -> None:
    values = np.random.default_rng(2).normal(0, 0.1, 60)
    values[57:] += 2.0
    assert judged(values).rise.errors > errors_needed(60)
    assert not judged(values).rose
    longer = np.concatenate([values, np.random.default_rng(3).normal(2.0, 0.1, 8)])
    assert judged(longer).rose


def test_a_fall_must_take_back_a_share_of_the_gain_and_be_worth_its_name() -> None:
    values = np.random.default_rng(4).normal(0, 0.05, 120) + np.interp(np.arange(120), [0, 40, 60, 119], [0, 1, 0.7, 0.7])
    assert not judged(values).fell
    assert judged(values, share_lost=0.2).fell
    assert not judged(values, share_lost=0.2, least_fall=0.5).fell


@given(
    values=st.lists(st.integers(-50, 50), min_size=FEWEST, max_size=80),
    factor=st.sampled_from([0.25, 8.0]),
    offset=st.sampled_from([-64.0, 0.0, 1024.0]),
)
@settings(deadline=None, max_examples=60)
def test_units_do_not_matter(values: list[int], factor: float, offset: float) -> None:
    series = np.array(values, dtype=np.float64)
    assume(long_run_deviation(series) > 0.1)
    one, other = judged(series), judged(factor * series + offset)
    assert other.noise == pytest.approx(factor * one.noise)
    assert other.rise.errors == pytest.approx(one.rise.errors, abs=1e-9)
    assert (other.rose, other.fell) == (one.rose, one.fell)


@given(st.lists(st.floats(-1e6, 1e6), min_size=FEWEST, max_size=120))
@settings(deadline=None, max_examples=60)
def test_any_finite_values_get_an_answer(values: list[float]) -> None:
    found = judged(np.array(values))
    assert not (found.rose and found.rise.difference <= 0)
    assert not (found.fell and found.fall is None)
    assert found.detectable >= 0


@pytest.mark.parametrize("memory", [0.0, 0.3, 0.5])
def test_noise_alone_is_hardly_ever_a_rise_or_a_fall(memory: float) -> None:
    """At most 2 % of the runs; benchmarks/verdict.py has the figures."""
    rng = np.random.default_rng(5)
    found = [judged(ar1(rng, size, memory)) for size in (24, 60, 200) for _ in range(70)]
    assert sum(one.rose for one in found) <= 4
    assert sum(one.fell for one in found) <= 4


def test_a_slow_rise_of_twice_the_noise_is_seen_within_a_few_hundred_steps() -> None:
    rng = np.random.default_rng(6)
    rising = [judged(ar1(rng, 300, 0.3) + np.linspace(0, 2, 300)) for _ in range(40)]
    assert sum(one.rose for one in rising) >= 32
    assert not any(one.fell for one in rising)
