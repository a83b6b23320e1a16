"""Means and their standard errors, against simulated spreads."""

import random
from statistics import fmean, stdev

import pytest

from turnwise.monitor.estimate import OverSeeds, over_tasks


def test_rollouts_of_one_task_count_as_one_observation():
    mean, error = over_tasks([("a", 0.0), ("a", 0.0), ("a", 0.0), ("b", 1.0)])
    assert (mean, error) == (0.25, pytest.approx(0.5))  # of the task means 0 and 1
    assert over_tasks([("a", 0.0), ("a", 1.0)]) == (0.5, None)


def test_the_error_is_the_spread_of_repeated_evaluations():
    draw = random.Random(0)

    def evaluation() -> tuple[float, float | None]:
        levels = [draw.gauss(0, 1) for _ in range(30)]
        return over_tasks((str(task), level + draw.gauss(0, 0.5)) for task, level in enumerate(levels) for _ in range(4))

    found = [evaluation() for _ in range(400)]
    assert fmean(error for _, error in found if error) == pytest.approx(stdev(mean for mean, _ in found), rel=0.1)


def test_nothing_has_no_mean_and_one_run_no_error_between_seeds():
    assert OverSeeds.of([], []).mean is None
    alone = OverSeeds.of([0.5], [None])
    assert (alone.mean, alone.stderr) == (0.5, None)
