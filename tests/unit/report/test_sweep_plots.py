"""Pictures of a sweep."""

from typing import Any

import pytest
from matplotlib.figure import Figure

from turnwise.report.sweep_plots import metric_panel

NAME = "val-core/task/acc/mean"
STDERR = NAME.removesuffix("mean") + "stderr"


def drawn(runs: dict[str, list[dict[int, dict[str, float]]]]) -> Any:
    axes = Figure().subplots()
    metric_panel(runs, NAME)(axes)
    return axes


def run(last: float) -> dict[int, dict[str, float]]:
    return {0: {NAME: 0.1, STDERR: 0.05}, 50: {NAME: last, STDERR: 0.05}}


def test_error_bars_of_equal_scores_stand_side_by_side_behind_the_last_step():
    axes = drawn({"one": [run(0.3)], "two": [run(0.3)]})
    one, two = (bar.lines[0].get_xdata()[0] for bar in axes.containers)
    assert 50 < one < two < 55
    for bar in axes.containers:
        low, high = bar.lines[2][0].get_segments()[0][:, 1]
        assert (low, high) == pytest.approx((0.25, 0.35))


def test_several_seeds_have_a_band_and_no_error_bar():
    axes = drawn({"one": [run(0.3), run(0.5)]})
    assert not axes.containers
    assert len(axes.collections) == 1
