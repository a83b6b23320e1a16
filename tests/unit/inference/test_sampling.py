"""Seeded sampling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.inference.embedded.sampling import sample, uniform


def test_uniform_numbers_repeat_and_differ_by_seed_and_index() -> None:
    values = {(seed, index): uniform(seed, index) for seed in range(50) for index in range(50)}
    assert len(set(values.values())) == 2500
    assert all(0 <= value < 1 for value in values.values())
    assert uniform(3, 4) == values[3, 4]


def test_uniform_numbers_are_uniform_along_seeds_and_along_indices() -> None:
    for values in ([uniform(5, i) for i in range(20_000)], [uniform(i, 5) for i in range(20_000)]):
        counts = torch.histc(torch.tensor(values), bins=20, min=0, max=1)
        chi_square = float(((counts - 1000) ** 2 / 1000).sum())
        assert chi_square < 43.8  # 0.1 % of 19 degrees of freedom


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("vocabulary", [10, 64, 200])
def test_frequencies_follow_the_tempered_distribution(temperature: float, vocabulary: int) -> None:
    draws = 20_000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    tokens, _ = sample(logits.repeat(draws, 1), [temperature] * draws, [uniform(9, i) for i in range(draws)])
    expected = torch.softmax(logits / temperature, -1) * draws
    counts = torch.bincount(torch.tensor(tokens), minlength=vocabulary)
    common = expected >= 5
    chi_square = float(((counts - expected) ** 2 / expected)[common].sum())
    degrees = int(common.sum())
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def test_logprobs_are_those_of_the_tempered_distribution() -> None:
    logits = torch.randn(4, 130, generator=torch.Generator().manual_seed(2))
    tokens, logprobs = sample(logits.clone(), [0.7] * 4, [0.1, 0.5, 0.9, 0.99])
    expected = torch.log_softmax(logits / 0.7, -1)[range(4), tokens]
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-6)


def test_temperature_zero_is_greedy_with_untempered_logprobs_beside_sampled_rows() -> None:
    logits = torch.randn(2, 130, generator=torch.Generator().manual_seed(3))
    tokens, logprobs = sample(logits.clone(), [0.0, 2.0], [0.3, 0.3])
    assert tokens[0] == int(logits[0].argmax())
    assert logprobs[0] == pytest.approx(float(torch.log_softmax(logits[0], -1).max()), abs=1e-6)
    assert logprobs[1] == pytest.approx(float(torch.log_softmax(logits[1] / 2, -1)[tokens[1]]), abs=1e-6)


@settings(deadline=None, max_examples=150)
@given(
    logits=st.lists(st.one_of(st.floats(-80, 80, width=32), st.just(-math.inf)), min_size=1, max_size=200),
    value=st.one_of(st.floats(0, 1, exclude_max=True), st.just(1 - 2**-53), st.just(0.0)),
)
def test_a_token_of_probability_zero_is_never_drawn(logits: list[float], value: float) -> None:
    if all(logit == -math.inf for logit in logits):
        logits = [*logits, 0.0]
    row = torch.tensor([logits], dtype=torch.float32)
    probabilities = torch.softmax(row, -1)[0]
    (token,), (logprob,) = sample(row.clone(), [1.0], [value])
    assert 0 <= token < len(logits)
    assert probabilities[token] > 0
    assert logprob <= 0


def test_a_row_is_drawn_the_same_whatever_other_rows_there_are() -> None:
    generator = torch.Generator().manual_seed(4)
    row = torch.randn(1, 49_152, generator=generator)
    alone = sample(row.clone(), [0.9], [0.4242])
    for others in (1, 7, 33):
        batch = torch.cat([torch.randn(others, 49_152, generator=generator), row])
        tokens, logprobs = sample(batch, [0.9] * (others + 1), [0.1] * others + [0.4242])
        assert (tokens[-1:], logprobs[-1:]) == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocabulary", [3, 130])
@pytest.mark.parametrize("planted", [[math.nan], [math.inf], [-math.inf] * 130])
def test_a_row_of_logits_that_are_not_finite_has_no_logprob_and_the_others_are_as_without_it(
    planted: list[float], vocabulary: int, temperature: float
) -> None:
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(5))
    sound = sample(logits[[0, 2]], [temperature] * 2, [0.2, 0.7])
    logits[1, -len(planted) :] = torch.tensor(planted[:vocabulary])
    tokens, logprobs = sample(logits, [temperature] * 3, [0.2, 0.5, 0.7])
    assert (tokens[1], math.isnan(logprobs[1])) == (0, True)
    assert ([tokens[0], tokens[2]], [logprobs[0], logprobs[2]]) == sound
