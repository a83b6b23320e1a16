"""The schedule of adaptive quantisation noise, against the published values and its own definition."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.config import NoiseConfig
from turnwise.inference.noise import Stage, epoch_stage, geometric, noise_schedule, run_stage

ENDS = (0.01, 0.0001)
PUBLISHED = [0.0, 0.01, 0.00562, 0.00316, 0.00178, 0.001, 0.00056, 0.00032, 0.00018, 0.0001]
ends = st.tuples(st.floats(1e-3, 0.5), st.floats(1e-6, 1e-3))


def test_ten_stages_have_the_published_values():
    sigmas = [run_stage(step, steps=100, stages=10, ends=ENDS).sigma for step in range(0, 100, 10)]
    assert [round(sigma, 5) for sigma in sigmas] == PUBLISHED


@pytest.mark.parametrize(
    ("step", "stage"), [(0, 0), (9, 0), (10, 1), (19, 1), (20, 2), (89, 8), (90, 9), (99, 9), (100, 9), (500, 9)]
)
def test_a_stage_lasts_a_tenth_of_the_run_and_the_last_one_for_ever(step: int, stage: int):
    found = run_stage(step, steps=100, stages=10, ends=ENDS)
    assert found == Stage(stage, 0.0 if stage == 0 else pytest.approx(0.01 * 0.01 ** ((stage - 1) / 8)))


def test_stages_that_no_number_of_steps_divides_begin_at_the_first_step_that_is_inside():
    """29 steps, 2.9 a stage."""
    numbers = [run_stage(step, steps=29, stages=10, ends=ENDS).number for step in range(30)]
    assert numbers == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 7, 8, 8, 8, 9, 9, 9]


@given(steps=st.integers(1, 5000), stages=st.integers(3, 40), step=st.integers(0, 6000))
def test_the_stage_is_that_of_the_published_formula(steps: int, stages: int, step: int):
    """Written out as it stands there, floats included."""
    trend = [0.01 * (0.0001 / 0.01) ** (i / (stages - 2)) for i in range(stages - 1)]
    stage = int(min(step, steps) // (steps / stages))
    sigma = 0.0 if stage == 0 else trend[min(stage - 1, stages - 2)]
    found = run_stage(step, steps=steps, stages=stages, ends=ENDS)
    assert (found.number, found.sigma) == (min(stage, stages - 1), pytest.approx(sigma))


@pytest.mark.parametrize("stages", [-1, 0, 1, 2])
def test_fewer_than_three_stages_are_refused(stages: int):
    with pytest.raises(ValueError, match=f"inference.noise.stages = {stages}: noise needs at least 3 stages"):
        run_stage(0, steps=10, stages=stages, ends=ENDS)
    with pytest.raises(ValueError, match="at least 3 stages"):
        epoch_stage(0, steps_per_epoch=10, epochs=1, stages=stages, ends=ENDS)


@given(steps=st.integers(1, 5000), stages=st.integers(3, 40), ends=ends)
def test_over_a_run_noise_begins_at_the_start_value_never_rises_and_stays_within_its_ends(
    steps: int, stages: int, ends: tuple[float, float]
):
    found = [run_stage(step, steps=steps, stages=stages, ends=ends) for step in {0, *range(0, steps + 2, max(1, steps // 97))}]
    assert found[0] == Stage(0, 0.0)
    noisy = [stage.sigma for stage in sorted(found, key=lambda stage: stage.number) if stage.number]
    assert all(a >= b for a, b in pairwise(noisy))
    assert all(ends[1] <= sigma <= ends[0] * (1 + 1e-12) for sigma in noisy)
    assert run_stage(steps, steps=steps, stages=stages, ends=ends) == Stage(stages - 1, ends[1])


# --- epochs -----------------------------------------------------------------------------------------------------------


def test_two_epochs_of_three_stages_by_hand():
    """b = 0.01, 0.001, 0.0001; each epoch of 8 steps: 2 without noise, then 3 stages of 2."""
    sigmas = [epoch_stage(step, steps_per_epoch=8, epochs=2, stages=3, ends=ENDS).sigma for step in range(17)]
    root = 10**0.5
    first = [0, 0, 0.01, 0.01, 0.01 / root, 0.01 / root, 0.001, 0.001]
    second = [0, 0, 0.001, 0.001, 0.001 / root, 0.001 / root, 0.0001, 0.0001]
    assert sigmas == pytest.approx([*first, *second, 0.0001])


@given(steps=st.integers(1, 500), stages=st.integers(3, 20), ends=ends)
def test_one_epoch_of_n_stages_is_a_run_of_n_plus_one(steps: int, stages: int, ends: tuple[float, float]):
    for step in range(0, steps + 1, max(1, steps // 50)):
        by_epoch = epoch_stage(step, steps_per_epoch=steps, epochs=1, stages=stages, ends=ends)
        by_run = run_stage(step, steps=steps, stages=stages + 1, ends=ends)
        assert by_epoch.number == by_run.number
        assert by_epoch.sigma == pytest.approx(by_run.sigma)


@given(steps=st.integers(1, 60), epochs=st.integers(1, 6), stages=st.integers(3, 12), ends=ends)
def test_every_epoch_begins_without_noise_and_goes_on_where_the_one_before_ended(
    steps: int, epochs: int, stages: int, ends: tuple[float, float]
):
    found = [epoch_stage(s, steps_per_epoch=steps, epochs=epochs, stages=stages, ends=ends) for s in range(steps * epochs)]
    assert all(found[epoch * steps] == Stage(0, 0.0) for epoch in range(epochs))
    noisy = [stage.sigma for stage in found if stage.number]
    assert all(a >= b * (1 - 1e-12) for a, b in pairwise(noisy))
    assert all(ends[1] * (1 - 1e-12) <= sigma <= ends[0] * (1 + 1e-12) for sigma in noisy)
    if steps > stages:  # then every stage has a step
        lasts = [found[epoch * steps + steps - 1].sigma for epoch in range(epochs)]
        assert lasts == pytest.approx([geometric(ends, epoch + 1, epochs + 1) for epoch in range(epochs)])


# --- from the configuration -------------------------------------------------------------------------------------------


def test_the_table_says_which_of_the_two_and_an_epoch_that_is_cut_short_counts():
    config = NoiseConfig(sigma_start=0.01, sigma_end=0.0001, stages=3)
    over_run = noise_schedule(config, max_steps=12, steps_per_epoch=8)
    assert [over_run(step).number for step in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    by_epoch = noise_schedule(config.model_copy(update={"epoch_aware": True}), max_steps=12, steps_per_epoch=8)
    assert [by_epoch(step).number for step in range(12)] == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1]
    assert by_epoch(10).sigma == pytest.approx(0.001)


def test_epochs_of_less_than_one_step_are_refused_with_the_remedy():
    config = NoiseConfig(epoch_aware=True)
    with pytest.raises(ValueError, match=r"epoch_aware = true .* smaller orchestrator.batch_size"):
        noise_schedule(config, max_steps=5, steps_per_epoch=0)
    assert noise_schedule(NoiseConfig(), max_steps=5, steps_per_epoch=0)(0) == Stage(0, 0.0)


def test_a_table_that_was_not_validated_is_refused_too():
    with pytest.raises(ValueError, match="at least 3 stages"):
        noise_schedule(NoiseConfig.model_construct(stages=2), max_steps=5, steps_per_epoch=5)
