"""Runs side by side, from planted run folders."""

import json
from pathlib import Path
from typing import Any

import pytest

from turnwise.cli.turnwise import run_command
from turnwise.config.files import dump_toml, merge
from turnwise.config.root import RLConfig
from turnwise.report.compare import Arm, RewardRule, arms_of, changes_against, differing
from turnwise.report.compare_page import write_compared

WIN = "val-aux/wordle/win"


def make_run(
    folder: Path, *, seed: int, wins: list[float], mode: str = "dense", format_paid: float = 0.2, **changes: Any
) -> Path:
    """A run of two evaluations, at steps 0 and 4, in which each of four tasks pays `format` and, at the end, `wins`."""
    tables = {
        "output_dir": str(folder),
        "run_name": folder.name,
        "seed": seed,
        "max_steps": 4,
        "orchestrator": {"env": [{"id": "wordle", "reward": {"mode": mode, "weights": {"format": 2.0}}}]},
    }
    (folder / "evals").mkdir(parents=True)
    (folder / "config.toml").write_text(dump_toml(RLConfig.model_validate(merge(tables, changes))))
    lines: list[dict[str, Any]] = []
    for step in range(5):
        lines.append({"step": step, "critic/reward/mean": step / 4, "actor/entropy": 1.0} if step else {"step": 0})
        if step in (0, 4):
            paid = [0.0] * 4 if step == 0 else wins
            rollouts = [
                {"env": "wordle", "task_id": f"t{i}", "components": {"format": format_paid, "win": win}}
                for i, win in enumerate(paid)
            ]
            rollouts.append({"env": "wordle", "task_id": "t9", "components": {"win": 100.0}, "error": "hung"})
            metrics = {f"{WIN}/mean": sum(paid) / 4, f"{WIN}/stderr": 0.05, "val-core/wordle/reward/mean": 0.0}
            content = {"step": step, "version": step, "metrics": metrics, "rollouts": rollouts}
            (folder / "evals" / f"step_{step}.json").write_text(json.dumps(content))
            lines[-1] |= metrics
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    """Two seeds of a dense run that wins half, and two of a sparse one that always wins and cares for no format."""
    dense = [make_run(tmp_path / f"d{seed}", seed=seed, wins=[1.0, 1.0, 0.0, 0.0 + seed / 2]) for seed in (0, 1)]
    sparse = [make_run(tmp_path / f"s{seed}", seed=seed, wins=[1.0] * 4, mode="sparse", format_paid=-0.5) for seed in (0, 1)]
    return [*dense, *sparse]


def test_runs_that_differ_by_their_seed_are_one_arm_named_by_what_sets_it_apart(four: list[Path]):
    arms = arms_of([(None, path) for path in four])
    assert [(arm.name, len(arm.runs)) for arm in arms] == [('mode = "dense"', 2), ('mode = "sparse"', 2)]
    assert differing(arms) == [("orchestrator.env[0].reward.mode", ['"dense"', '"sparse"'])]


def test_runs_can_be_put_into_arms_by_name(four: list[Path]):
    arms = arms_of([("mine", four[0]), ("mine", four[2]), (None, four[3])])
    assert next((arm.name, len(arm.runs)) for arm in arms) == ("mine", 2)


def test_each_arm_is_paid_by_the_reward_of_the_other_too(four: list[Path]):
    dense, sparse = arms_of([(None, path) for path in four])
    # win + 2 * format, and win alone; the rollout that errored is paid by neither
    assert dense.earned(dense.reward).values == pytest.approx((0.5 + 0.4, 0.625 + 0.4))
    assert dense.earned(sparse.reward).values == (0.5, 0.625)
    assert sparse.earned(dense.reward).values == (1.0 - 1.0, 1.0 - 1.0)
    assert sparse.earned(sparse.reward).values == (1.0, 1.0)
    assert dense.earned(sparse.reward, first=True).values == (0.0, 0.0)


def test_a_difference_is_judged_by_its_standard_error(four: list[Path]):
    dense, sparse = arms_of([(None, path) for path in four])
    (change,) = changes_against(dense, sparse, [f"{WIN}/mean", "val-aux/wordle/never/mean"])
    assert (change.before, change.after, change.verdict) == (0.5625, 1.0, "rose")
    (same,) = changes_against(dense, Arm("again", dense.runs), [f"{WIN}/mean"])
    assert same.verdict == "unchanged"


def test_the_page_tells_differences_rewards_and_metrics_and_has_a_picture(four: list[Path], tmp_path: Path):
    page = write_compared(arms_of([(None, path) for path in four]), tmp_path / "out")
    text = page.read_text()
    assert '| orchestrator.env[0].reward.mode | "dense" | "sparse" |' in text
    assert '| mode = "dense" | mode = "sparse" | -1 ± 0 | 0 ± 0 |' in text
    assert "| val-aux/wordle/win | 0.562 ± 0.062 | 1 ± 0.035 | higher |" in text
    assert page.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(page.with_suffix(".json").read_text())
    assert [entry["last"]["mean"] for entry in numbers["rewards"]] == pytest.approx([0.9625, 0.0, 0.5625, 1.0])


def test_evaluations_of_different_steps_are_told(four: list[Path], tmp_path: Path):
    (four[0] / "evals" / "step_4.json").unlink()
    lines = (four[0] / "metrics.jsonl").read_text().splitlines()[:4]
    (four[0] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = write_compared(arms_of([(None, path) for path in four]), tmp_path / "out").read_text()
    assert "different steps: 0, 4" in text
    assert "| 3 of 4, 4 |" in text


def test_what_cannot_be_compared_is_refused_by_name(four: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    for wrong, word in (("nowhere", "no such folder"), ("empty", "holds no run"), ("d0", "given twice")):
        assert run_command(["compare", str(four[0]), str(tmp_path / wrong), "--output", str(tmp_path / "out")]) == 2
        assert word in capsys.readouterr().err


def test_the_command_prints_the_tables_or_the_numbers(four: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = ["compare", *(f"all={path}" for path in four[:2]), str(four[2]), "--output", str(tmp_path / "out")]
    assert run_command(line) == 0
    shown = capsys.readouterr().out
    assert "| all | 2 | 0, 1 |" in shown
    assert "comparison.png" in shown
    assert run_command([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["arms"][0]["name"] == "all"


def test_two_tables_of_one_environment_are_paid_each_by_its_own():
    tables = [{"id": "wordle"}, {"id": "wordle", "reward": {"weights": {"win": 3.0}}}]
    rule = RewardRule.of({"orchestrator": {"env": tables}})
    assert [rule.of_rollout({"env": name, "components": {"win": 1.0}}) for name in ("wordle", "wordle-2")] == [1.0, 3.0]
