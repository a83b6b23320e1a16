"""Each warning fires on a run with that fault planted, and none on a healthy run."""

import json
import random
from pathlib import Path

import pytest

from support.planted_run import Curve, plant_run
from turnwise.report import Run
from turnwise.report.findings import findings


def titles(run_root: Path) -> set[str]:
    return {found.title for found in findings(Run.load(run_root))}


def test_a_healthy_run_has_no_warning(tmp_path: Path) -> None:
    assert titles(plant_run(tmp_path / "run")) == set()


def test_an_empty_folder_has_no_warning(tmp_path: Path) -> None:
    assert titles(tmp_path) == set()


@pytest.mark.parametrize(
    ("metrics", "title"),
    [
        ({"groups/equal_reward/share": lambda x: x}, "Most groups carry no signal"),
        ({"response_length/mean": lambda x: 20 + 100 * x}, "Length explosion"),
        (
            {"stop_reason/context_full/count": lambda x: 8.0, "stop_reason/terminated/count": lambda x: 24.0},
            "Too long for the limits",
        ),
        ({"response_length/cut/share": lambda x: 0.3}, "Too long for the limits"),
        ({"actor/entropy": lambda x: 2 * (1 - x) ** 4}, "Entropy collapse"),
        ({"mismatch/logprob_abs/mean": lambda x: 0.2 * x, "staleness/max": lambda x: 0.0}, "Engine and trainer disagree"),
        ({"mismatch/kl/mean": lambda x: 0.05, "staleness/max": lambda x: 0.0}, "Engine and trainer disagree"),
        ({"rollouts/errored/count": lambda x: 3.0}, "Rollouts ended with errors"),
        ({"monitor/nonfinite/count": lambda x: 1.0}, "Metrics were NaN or infinite"),
        ({"groups/stale/count": lambda x: 2.0}, "Groups were too old to train on"),
        ({"actor/grad_norm": lambda x: 0.0 if x > 0.5 else 0.3}, "Steps without a gradient"),
    ],
)
def test_a_planted_fault_is_found_and_nothing_else(tmp_path: Path, metrics: dict[str, Curve], title: str) -> None:
    root = plant_run(tmp_path / "run", metrics=metrics)
    found = findings(Run.load(root))
    assert [f.title for f in found] == [title]
    assert any(character.isdigit() for character in found[0].evidence)
    assert found[0].remedy


def test_a_flat_reward_is_found(tmp_path: Path) -> None:
    (found,) = findings(Run.load(plant_run(tmp_path / "run", components={"win": lambda x: 0.5})))
    assert found.title == "The reward did not rise"
    assert "the reward was 0.501 over the first third of 40 steps" in found.evidence
    assert "not changed beyond chance: from 0.5 at step 0 to 0.5 at step 40" in found.evidence


def test_a_collapse_is_found(tmp_path: Path) -> None:
    (found,) = findings(Run.load(plant_run(tmp_path / "run", components={"win": lambda x: 1.0 - x})))
    assert found.title == "The run collapsed"
    assert "the held-out reward fell from 1 at step 0 to 0 at step 40" in found.evidence
    assert "checkpoint" in found.remedy


def test_a_run_without_signal_is_found(tmp_path: Path) -> None:
    root = plant_run(tmp_path / "run", components={"win": lambda x: 0.5}, metrics={"groups/equal_reward/share": lambda x: 1.0})
    assert titles(root) == {"There was nothing to learn from", "Most groups carry no signal"}


def test_a_few_steps_are_no_flat_reward(tmp_path: Path) -> None:
    assert titles(plant_run(tmp_path / "run", steps=4, components={"win": lambda x: 0.5})) == set()


def test_replies_that_are_one_word_are_found_and_quoted(tmp_path: Path) -> None:
    def mostly_crane(rng: random.Random) -> str:
        return "crane" if rng.random() < 0.9 else rng.choice(["slate", "trail"])

    found = findings(Run.load(plant_run(tmp_path / "run", reply=mostly_crane)))
    assert [f.title for f in found] == ["Replies collapsed to a constant"]
    assert "`crane`" in found[0].evidence
    assert "3 distinct replies among 72" in found[0].evidence


def test_errors_are_counted_by_what_they_say(tmp_path: Path) -> None:
    root = plant_run(tmp_path / "run", metrics={"rollouts/errored/count": lambda x: 2.0})
    path = root / "trajectories" / "step_3.jsonl"
    rollouts = [
        json.loads(line) | {"error": "Traceback ...\nTimeoutError: step took 60 s"} for line in path.read_text().splitlines()
    ]
    path.write_text("".join(json.dumps(rollout) + "\n" for rollout in rollouts))
    (found,) = findings(Run.load(root))
    assert "80 errored rollouts over 40 steps" in found.evidence
    assert '8 × "TimeoutError: step took 60 s"' in found.evidence


def test_the_policys_own_progress_on_stale_batches_is_no_mismatch(tmp_path: Path) -> None:
    root = plant_run(tmp_path / "run", metrics={"mismatch/kl/mean": lambda x: 0.05, "staleness/max": lambda x: 1.0})
    assert titles(root) == set()
