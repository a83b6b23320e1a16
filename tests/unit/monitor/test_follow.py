"""A run folder read while it grows."""

import json
from pathlib import Path

import pytest

from support.recorded_rollout import rollout
from turnwise.config import RLConfig
from turnwise.monitor.follow import HELD_OUT, TRAINING, Follower
from turnwise.monitor.secrets import Redactor


def follower(root: Path, *, samples: int = 2, interval: int | None = None, max_steps: int = 1000) -> Follower:
    return Follower(RLConfig(output_dir=root, max_steps=max_steps), Redactor({}, {}), samples=samples, interval=interval)


def write_line(root: Path, step: int, *, end: str = "\n", **metrics: float | None) -> None:
    with (root / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": 100.0 + step, **metrics}) + end)


def test_each_line_comes_once_and_a_torn_one_when_it_is_whole(tmp_path: Path):
    following = follower(tmp_path)
    assert list(following.records()) == []
    write_line(tmp_path, 1, loss=0.5, broken=None)
    write_line(tmp_path, 2, end="", loss=0.25)
    (first,) = following.records()
    assert (first.step, first.time, first.metrics) == (1, 101.0, {"loss": 0.5})
    assert list(following.records()) == []
    (tmp_path / "metrics.jsonl").open("a").write("\n")
    assert [record.step for record in following.records()] == [2]


def test_rollouts_stand_beside_their_step_at_the_interval(tmp_path: Path):
    (tmp_path / "trajectories").mkdir()
    for step in (1, 5, 10):
        lines = [json.dumps(rollout(reward)) + "\n" for reward in (0.0, 1.0, 0.5)]
        (tmp_path / "trajectories" / f"step_{step}.jsonl").write_text("".join(lines))
        write_line(tmp_path, step, loss=0.5)
    records = list(follower(tmp_path).records())  # a hundredth of 1,000 steps
    assert [list(record.samples) for record in records] == [[TRAINING], [], [TRAINING]]
    assert [(row[0], row[4]) for row in records[2].samples[TRAINING]] == [(10, 1.0), (10, 0.0)]
    assert [list(record.samples) for record in follower(tmp_path, interval=5).records()] == [[TRAINING]] * 3
    assert not any(record.samples for record in follower(tmp_path, samples=0).records())


def test_an_evaluation_has_its_own_table(tmp_path: Path):
    (tmp_path / "evals").mkdir()
    (tmp_path / "evals" / "step_0.json").write_text(json.dumps({"rollouts": [rollout(turns=2)], "metrics": {}}))
    write_line(tmp_path, 0, **{"val-core/wordle/reward/mean": 0.5})
    (record,) = follower(tmp_path).records()
    assert [row[0] for row in record.samples[HELD_OUT]] == [0]


def checkpoint(root: Path, step: int, reward: float | None = None) -> None:
    folder = root / "checkpoints" / f"step_{step}"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text("{}")
    if reward is not None:
        (root / "evals").mkdir(exist_ok=True)
        metrics = {"val-core/wordle/reward/mean": reward}
        (root / "evals" / f"step_{step}.json").write_text(json.dumps({"metrics": metrics, "rollouts": []}))


def test_checkpoints_are_told_when_something_about_them_changes(tmp_path: Path):
    following = follower(tmp_path)
    assert following.checkpoints() == []
    checkpoint(tmp_path, 10)
    (tmp_path / "checkpoints" / "step_11").mkdir()  # no meta.json: it is not whole
    assert [(one.step, one.best) for one in following.checkpoints()] == [(10, False)]
    assert following.checkpoints() == []
    checkpoint(tmp_path, 20, 0.5)
    checkpoint(tmp_path, 30, 0.25)
    assert [(one.step, one.best, one.reward) for one in following.checkpoints()] == [
        (10, False, None),
        (20, True, 0.5),
        (30, False, 0.25),
    ]


def test_a_report_comes_with_its_pictures(tmp_path: Path):
    (tmp_path / "report").mkdir()
    for name in ("report/reward.png", "report/changes.json", "report/other.txt"):
        (tmp_path / name).write_text("{}")
    assert follower(tmp_path).report() == []
    (tmp_path / "report.md").write_text("# Report")
    names = [path.relative_to(tmp_path).as_posix() for path in follower(tmp_path).report()]
    assert names == ["report.md", "report/reward.png", "report/changes.json"]


def test_a_line_that_is_no_json_is_refused(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match="Expecting value"):
        list(follower(tmp_path).records())
