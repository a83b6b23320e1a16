"""The tracker's process as `rl` sees it: what it is told, and that nothing of it can hold up a run."""

import json
import sys
from pathlib import Path

import pytest

from support.fake_wandb import FakeWandb
from turnwise.config import ConfigError, RLConfig
from turnwise.launch.supervise import ExitCode, Outcome
from turnwise.launch.tracking import TrackingProcess, check_tracking, ending_of, is_tracked
from turnwise.launch.watch import Progress
from turnwise.monitor.tracking import Ending

ENDING = Ending("done", "all steps done", 0, {"verdict": "learning"})


def process(root: Path, script: str, *, timeout_s: float = 60) -> TrackingProcess:
    config = RLConfig(output_dir=root, monitor={"upload_timeout_s": timeout_s})
    return TrackingProcess(config, (sys.executable, "-S", "-c", f"import sys\n{script}"))


def concluded(tracking: TrackingProcess) -> list[str]:
    said: list[str] = []
    tracking.conclude(ENDING, said.append)
    return said


def test_it_is_told_how_the_run_ended_and_says_where_to_look(tmp_path: Path):
    told, places = tmp_path / "told", tmp_path / "tracking" / "places"
    places.parent.mkdir()
    script = f"open({str(told)!r}, 'w').write(sys.stdin.read()); open({str(places)!r}, 'w').write('W&B: x')"
    assert concluded(process(tmp_path, script)) == ["W&B: x"]
    assert Ending(**json.loads(told.read_text())) == ENDING


def test_one_that_hangs_is_killed_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("turnwise.launch.tracking.SLACK_S", 0.0)
    monkeypatch.setattr("turnwise.launch.tracking.QUIET_S", 0.0)
    said = concluded(process(tmp_path, "import time; time.sleep(600)", timeout_s=0.2))
    assert "for 0.2 s at most" in said[0]
    assert "ended early (exit code -9)" in said[1]


def test_ctrl_c_ends_the_wait_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("turnwise.launch.tracking.QUIET_S", 0.0)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("Uploading"):
            raise KeyboardInterrupt

    process(tmp_path, "import time; time.sleep(600)").conclude(ENDING, say)
    assert "ended early (exit code -9)" in said[1]


def test_one_that_died_is_told_of_with_its_last_words(tmp_path: Path):
    dead = process(tmp_path, "sys.exit('boom')")
    dead._process.wait()
    assert [line.strip() for line in concluded(dead)][1:] == ["boom"]


def test_an_ending_carries_verdict_and_scores():
    progress = Progress(10)
    progress.rewards[7] = 0.5
    progress.evals = {step: {"val-core/wordle/reward/mean": reward} for step, reward in ((0, 0.25), (5, 0.75), (7, 0.5))}
    ending = ending_of(Outcome(ExitCode.ABORTED, "abort_when held"), progress)
    assert (ending.outcome, ending.reason, ending.code) == ("aborted", "abort_when held", 4)
    summary = dict(ending.summary)
    assert summary.pop("verdict_reason")
    assert summary == {
        **{"step": 7, "verdict": "too early"},
        **{"best_step": 5, "best_held_out_reward": 0.75, "last_held_out_reward": 0.5},
    }


@pytest.mark.parametrize(
    ("tables", "tracked"),
    [({}, False), ({"wandb": {"mode": "disabled"}}, False), ({"wandb": {"mode": "offline"}}, True), ({"mlflow": {}}, True)],
)
def test_only_a_run_with_a_table_is_tracked(tables: dict[str, object], tracked: bool):
    assert is_tracked(RLConfig.model_validate(tables)) is tracked


def test_everything_that_is_missing_is_said_before_a_run_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("turnwise.monitor.mlflow_sink.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        check_tracking(RLConfig(wandb={}, mlflow={}))
    assert "turnwise[wandb]" in str(error.value)
    assert "turnwise[mlflow]" in str(error.value)
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    check_tracking(RLConfig(wandb={}))
