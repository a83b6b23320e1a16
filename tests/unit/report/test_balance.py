"""Who waited for whom, and the key that is named."""

from pathlib import Path

import pytest

from support.planted_run import plant_run
from turnwise.report import Run
from turnwise.report.balance import Balance
from turnwise.report.findings import findings
from turnwise.report.write import write_report

TRAINER, ENGINE = "perf/trainer_idle/share", "perf/engine_idle/share"
STALENESS, LOAD = "perf/held_by_staleness/share", "perf/held_by_load/share"


def plant(folder: Path, **planted: float) -> Run:
    """A run whose named metrics are constant."""
    return Run.load(plant_run(folder, metrics={name: lambda x, value=value: value for name, value in planted.items()}))


@pytest.mark.parametrize(
    ("trainer", "engine", "others", "verdict", "key"),
    [
        (0.03, 0.41, {STALENESS: 0.5}, "the trainer was the bottleneck: it idled 3% while the engines idled 41%", "gpus.trainer"),
        (
            0.0,
            0.7,
            {STALENESS: 0.9, "staleness/mean": 2.0},
            "the trainer was the bottleneck",
            "lower orchestrator.max_staleness to 1: rollouts were 2.0 versions old",
        ),
        (0.55, 0.02, {LOAD: 0.3}, "the engines were the bottleneck: they idled 2% while the trainer idled 55%", "gpus.inference"),
        (0.55, 0.02, {}, "the engines were the bottleneck", "orchestrator.max_inflight"),
        (0.55, 0.02, {STALENESS: 0.3}, "the engines were the bottleneck", "orchestrator.max_staleness"),
        (
            0.3,
            0.02,
            {STALENESS: 0.5, "staleness/mean": 2.0},
            "the engines were the bottleneck",
            "lower orchestrator.max_inflight: rollouts were 2.0 versions old",
        ),
        (
            0.45,
            0.5,
            {STALENESS: 0.4},
            "waited for each other: the trainer idled 45%, the engines 50%",
            "orchestrator.max_staleness",
        ),
        (
            0.45,
            0.5,
            {"timing/env_s": 6.8},
            "waited for each other",
            "80% of their time in environments: raise orchestrator.max_inf",
        ),
    ],
)
def test_the_side_that_idles_less_is_the_bottleneck(
    tmp_path: Path, trainer: float, engine: float, others: dict[str, float], verdict: str, key: str
) -> None:
    run = plant(tmp_path / "run", **{TRAINER: trainer, ENGINE: engine, **others})
    (found,) = findings(run)
    assert found.title == "One side waits for the other"
    assert verdict in found.evidence
    assert key in found.remedy
    assert f"- Who waited: {found.evidence}\n" in write_report(run.root).read_text()


def test_a_run_with_both_sides_busy_has_a_verdict_and_no_warning(tmp_path: Path) -> None:
    run = plant(tmp_path / "run", **{TRAINER: 0.1, ENGINE: 0.05})
    balance = Balance.of(run)
    assert balance is not None
    assert balance.verdict == "neither side was the bottleneck: the trainer idled 10%, the engines 5% of the time"
    assert findings(run) == []


def test_without_staleness_the_turns_are_told_and_not_warned_of(tmp_path: Path) -> None:
    run = plant(tmp_path / "run", **{TRAINER: 0.6, ENGINE: 0.4, STALENESS: 0.5})
    config = {**run.config, "orchestrator": {**run.config["orchestrator"], "max_staleness": 0}}
    synchronous = Run(run.root, config, run.metrics, run.evals)
    assert findings(synchronous) == []
    balance = Balance.of(synchronous)
    assert balance is not None
    assert balance.remedy == "raise orchestrator.max_staleness (it is 0), so that both work at the same time"


def test_the_first_steps_do_not_count_and_long_steps_count_for_more(tmp_path: Path) -> None:
    metrics = {step: {TRAINER: 1.0, ENGINE: 1.0, "timing/step_s": 100.0} for step in (1, 2)}
    metrics |= {step: {TRAINER: 0.0, ENGINE: 0.4, "timing/step_s": 3.0} for step in range(3, 8)}
    metrics[8] = {TRAINER: 0.8, ENGINE: 0.0, "timing/step_s": 15.0}
    balance = Balance.of(Run(tmp_path, {}, metrics))
    assert balance is not None
    assert (balance.trainer_idle, balance.engine_idle) == (pytest.approx(0.4), pytest.approx(0.2))


def test_a_run_that_measured_one_side_only_has_no_verdict(tmp_path: Path) -> None:
    assert Balance.of(plant(tmp_path / "run", **{TRAINER: 0.9})) is None
