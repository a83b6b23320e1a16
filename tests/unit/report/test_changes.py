"""Before and after: numbers, verdicts, and the sentence about them."""

import json
import math
from pathlib import Path

import pytest

from support.planted_run import plant_run
from turnwise.report import Run, changes, seeds_table
from turnwise.report.changes import Change, conclusion, format_alone, table


def change(before: float, after: float, stderr: float | None, name: str = "val-aux/wordle/win") -> Change:
    return Change(name, "component", before, after, stderr)


@pytest.mark.parametrize(
    ("before", "after", "stderr", "verdict"),
    [
        (0.0, 0.31, 0.1, "rose"),
        (0.0, 0.29, 0.1, "unchanged"),
        (0.5, 0.1, 0.1, "fell"),
        (0.0, 1.0, 0.0, "rose"),
        (1.0, 1.0, 0.0, "unchanged"),
        (0.0, 1.0, None, "unknown"),
        (1.0, 1.0, None, "unchanged"),
    ],
)
def test_a_verdict_needs_three_standard_errors(before: float, after: float, stderr: float | None, verdict: str) -> None:
    assert change(before, after, stderr).verdict == verdict


def test_standard_errors_of_both_evaluations_add_in_quadrature(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "val-core/x/reward/mean": 0.1, "val-core/x/reward/stderr": 0.03, "val-core/x/acc/mean": 0.2},
        {"step": 9, "val-core/x/reward/mean": 0.6, "val-core/x/reward/stderr": 0.04, "val-core/x/acc/mean": 0.3},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    by_name = {found.name: found for found in changes(Run.load(tmp_path))}
    reward = by_name["val-core/x/reward"]
    assert (reward.kind, reward.stderr) == ("reward", pytest.approx(0.05))
    assert reward.standard_errors == pytest.approx(10.0)
    assert by_name["val-core/x/acc"].verdict == "unknown"


def test_every_component_and_metric_is_in_the_table_rewards_first(tmp_path: Path) -> None:
    found = changes(Run.load(plant_run(tmp_path / "run")))
    assert [(c.name, c.kind, c.verdict) for c in found] == [
        ("val-core/wordle/reward", "reward", "rose"),
        ("val-aux/wordle/feedback", "component", "rose"),
        ("val-aux/wordle/format", "component", "rose"),
        ("val-aux/wordle/win", "component", "unchanged"),
        ("val-aux/wordle/distinct_replies", "metric", "unchanged"),
        ("val-aux/wordle/reply_entropy", "metric", "unchanged"),
        ("val-aux/wordle/win_rate", "metric", "unchanged"),
    ]
    text = table(found)
    assert all(c.name in text for c in found)
    assert "| val-core/wordle/reward | reward | 0 | 1.4 | +1.4 | +33.0 | **rose** |" in text


def test_a_rise_by_format_alone_is_called_that(tmp_path: Path) -> None:
    alone = {"format": lambda x: x, "valid_word": lambda x: 0.5 * x, "feedback": lambda x: 0.1, "win": lambda x: 0.0}
    found = changes(Run.load(plant_run(tmp_path / "alone", components=alone)))
    assert format_alone(found)
    assert "format alone" in conclusion(found)
    assert "unchanged: feedback, win" in conclusion(found)
    assert "format alone" not in conclusion(changes(Run.load(plant_run(tmp_path / "more"))))


def test_a_fall_and_a_standstill_are_said_in_words(tmp_path: Path) -> None:
    fell = conclusion(changes(Run.load(plant_run(tmp_path / "fell", components={"format": lambda x: 1 - x}))))
    assert "**fell** from 1.000 to 0.000" in fell
    assert "fell: format" in fell
    flat = conclusion(changes(Run.load(plant_run(tmp_path / "flat", components={"format": lambda x: 0.5}))))
    assert "did not change beyond chance" in flat


def test_one_evaluation_is_no_comparison(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val-core/x/reward/mean": 0.1}\n')
    assert changes(Run.load(tmp_path)) == []
    assert "not two evaluations" in conclusion([])


def test_changes_are_json_even_without_any_spread() -> None:
    certain = change(0.0, 1.0, 0.0)
    assert certain.standard_errors == math.inf
    assert json.loads(json.dumps(certain.as_dict(), allow_nan=False))["verdict"] == "rose"


def test_seeds_stand_side_by_side_with_their_mean(tmp_path: Path) -> None:
    runs = [
        plant_run(tmp_path / str(seed), seed=seed, steps=4, components={"win": lambda x, s=seed: s * x})  # type: ignore[misc]
        for seed in (1, 2, 3)
    ]
    text = seeds_table(runs)
    assert "| val-aux/wordle/win | seed 2 | 0 | 2 | +2 | 0.042 | +47.1 | rose |" in text
    assert "| val-aux/wordle/win | *mean of 3* | 0 | 2 | +2 | 0.58 | +3.5 | |" in text  # std of 1, 2, 3 is 1; 1 / sqrt(3)
