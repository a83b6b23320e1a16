"""A run in W&B: what it is told, what a resumed start repeats, what happens when W&B fails."""

import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from support.fake_wandb import FakeRun, FakeWandb
from turnwise.config import RLConfig
from turnwise.monitor.follow import SHOWN_INCREMENTS
from turnwise.monitor.secrets import Redactor
from turnwise.monitor.tracking import Checkpoint, Ending, StepRecord
from turnwise.monitor.wandb_sink import WandbTracker, missing_for_wandb

ROW = (1, "wordle", "crane", "g1-0", 0.5, "green +0.5", 2, 14, "terminated", "text")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    return planted(monkeypatch)


def planted(monkeypatch: pytest.MonkeyPatch, *faults: str, keep: bool = True) -> FakeWandb:
    fake = FakeWandb(*faults, keep=keep)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", "/nowhere")
    return fake


def tracker(root: Path, **settings: Any) -> WandbTracker:
    config = RLConfig(
        output_dir=root, run_name="first try", wandb=settings, inference={"vllm": {"api_key": "planted-secret-value"}}
    )
    assert config.wandb is not None
    return WandbTracker(config, config.wandb, Redactor(config.model_dump(mode="json"), {}))


def line(step: int, at: float, *rows: Any, **metrics: float) -> StepRecord:
    return StepRecord(step, at, metrics, {"samples/train": rows} if rows else {})


def test_a_line_is_a_row_under_the_same_names_on_the_axis_of_steps(wandb: FakeWandb, tmp_path: Path):
    tracker(tmp_path).log(line(7, 100.0, loss=0.5))
    (run,) = wandb.runs
    assert run.logged == [(0, {"_timestamp": 100.0, "step": 7, "loss": 0.5})]
    assert run.axes == {"step": None, "*": "step"}


def test_a_run_carries_its_settings_and_a_configuration_without_secrets(wandb: FakeWandb, tmp_path: Path):
    tracker(tmp_path, project="games", entity="us", group="sweep", tags=["cpu"])
    chosen = {key: wandb.options[key] for key in ("project", "entity", "group", "tags", "name", "resume")}
    assert chosen == {
        **{"project": "games", "entity": "us", "group": "sweep", "tags": ["cpu"]},
        **{"name": "first try", "resume": "allow"},
    }
    assert wandb.options["config"]["inference"]["vllm"] == {"api_key": "***"}
    assert "planted-secret-value" not in json.dumps(wandb.options["config"])


def test_a_resumed_run_keeps_its_id_counts_its_rows_on_and_loses_no_repeated_step(wandb: FakeWandb, tmp_path: Path):
    first = tracker(tmp_path)
    for step in (1, 2, 3):
        first.log(line(step, 100.0 + step, loss=float(step)))
    second = tracker(tmp_path)  # resumed from the checkpoint of step 1: the file holds line 1 and new lines 2, 3
    for record in (line(1, 101.0, loss=1.0), line(2, 202.0, loss=20.0), line(3, 203.0, loss=30.0)):
        second.log(record)
    assert first.run.id == second.run.id == (tmp_path / "wandb_id").read_text().strip()
    rows = [(number, values["step"], values["loss"]) for run in wandb.runs for number, values in run.logged]
    assert rows == [(0, 1, 1.0), (1, 2, 2.0), (2, 3, 3.0), (3, 2, 20.0), (4, 3, 30.0)]


def test_a_line_that_could_not_be_sent_is_sent_by_the_next_start(wandb: FakeWandb, tmp_path: Path):
    first = tracker(tmp_path)
    first.log(line(1, 101.0, loss=1.0))
    wandb.faults.add("log")
    with pytest.raises(ConnectionError):
        first.log(line(2, 102.0, loss=2.0))
    wandb.faults.clear()
    second = tracker(tmp_path)
    for record in (line(1, 101.0, loss=1.0), line(2, 102.0, loss=2.0)):
        second.log(record)
    assert [(number, values["step"]) for number, values in wandb.runs[1].logged] == [(2, 2)]


def test_a_clock_that_is_set_back_loses_no_line(wandb: FakeWandb, tmp_path: Path):
    running = tracker(tmp_path)
    running.log(line(1, 101.0, loss=1.0))
    running.log(line(2, 99.0, loss=2.0))
    assert [values["step"] for _, values in wandb.runs[0].logged] == [1, 2]


def test_a_table_grows_and_gives_up_its_text(wandb: FakeWandb, tmp_path: Path):
    running = tracker(tmp_path)
    for step in (1, 2):
        running.log(line(step, 100.0 + step, ROW, ROW))
    first, second = (values["samples/train"] for _, values in wandb.runs[0].logged)
    assert first is second
    assert (first.log_mode, first.data) == ("INCREMENTAL", [()] * 4)
    for step in range(3, SHOWN_INCREMENTS + 2):
        running.log(line(step, 100.0 + step, ROW))
    assert wandb.runs[0].logged[-2][1]["samples/train"] is first
    assert wandb.runs[0].logged[-1][1]["samples/train"] is not first


def test_ten_thousand_steps_leave_no_objects_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    planted(monkeypatch, keep=False)
    monkeypatch.setattr("turnwise.monitor.tracking.Memory.save", lambda self: None)  # 10,000 files are another matter
    running = tracker(tmp_path)

    def objects_after(steps: range) -> int:
        for step in steps:
            running.log(StepRecord(step, float(step), {"loss": 0.5}, {"samples/train": [(step, *ROW[1:])]}))
        gc.collect()
        return len(gc.get_objects())

    before = objects_after(range(1, 2 * SHOWN_INCREMENTS))
    assert objects_after(range(2 * SHOWN_INCREMENTS, 10_000)) - before < 100


def checkpoint(root: Path, step: int, *, best: bool = False, made: float = 1.0) -> Checkpoint:
    folder = root / "checkpoints" / f"step_{step}"
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    return Checkpoint(step, folder, made, best, 0.5)


def uploads(run: FakeRun) -> list[tuple[str, list[str]]]:
    return [(artifact.folders[0], aliases) for artifact, aliases in run.artifacts]


def test_an_adapter_is_uploaded_once_and_again_when_it_has_become_the_best(wandb: FakeWandb, tmp_path: Path):
    running, adapter = tracker(tmp_path), str(tmp_path / "checkpoints" / "step_{}" / "adapter")
    running.checkpoint(checkpoint(tmp_path, 10))
    running.checkpoint(checkpoint(tmp_path, 10))
    running.checkpoint(checkpoint(tmp_path, 20))
    running.checkpoint(checkpoint(tmp_path, 10, best=True))
    assert uploads(wandb.runs[0]) == [
        (adapter.format(10), ["latest", "step-10"]),
        (adapter.format(20), ["latest", "step-20"]),
        (adapter.format(10), ["step-10", "best"]),
    ]
    resumed = tracker(tmp_path)
    resumed.checkpoint(checkpoint(tmp_path, 20))
    resumed.checkpoint(checkpoint(tmp_path, 10, best=True))
    assert uploads(wandb.runs[1]) == []
    resumed.checkpoint(checkpoint(tmp_path, 20, made=2.0))  # the step was done again
    assert uploads(wandb.runs[1]) == [(adapter.format(20), ["latest", "step-20"])]


def test_whole_checkpoints_come_on_request_and_nothing_comes_unasked(wandb: FakeWandb, tmp_path: Path):
    tracker(tmp_path / "a", artifacts="checkpoints").checkpoint(checkpoint(tmp_path, 10))
    tracker(tmp_path / "b", artifacts="none").checkpoint(checkpoint(tmp_path, 10))
    full = Checkpoint(20, tmp_path, 1.0, False)  # full fine-tuning: it has no adapter
    tracker(tmp_path / "c", artifacts="adapter").checkpoint(full)
    assert [uploads(run) for run in wandb.runs] == [[(str(tmp_path / "checkpoints" / "step_10"), ["latest", "step-10"])], [], []]


def test_the_end_brings_the_report_the_verdict_and_the_exit_code(wandb: FakeWandb, tmp_path: Path):
    running = tracker(tmp_path)
    page, picture = tmp_path / "report.md", tmp_path / "report" / "reward.png"
    picture.parent.mkdir()
    page.write_text("the key is planted-secret-value")
    picture.write_bytes(b"\x89PNG")
    running.log(line(5, 100.0, loss=1.0))
    place = running.finish(Ending("aborted", "planted-secret-value was refused", 4, {"verdict": "flat"}), [page, picture])
    (run,) = wandb.runs
    assert place == run.url
    assert run.summary == {"outcome": "aborted", "outcome_reason": "*** was refused", "verdict": "flat"}
    assert run.exit_code == 4
    ((artifact, aliases),) = run.artifacts
    assert (artifact.type, aliases) == ("report", ["latest"])
    assert artifact.files == {"report.md": "the key is ***", "report/reward.png": str(picture)}
    number, values = run.logged[-1]
    assert (number, values["step"], values["report/reward"].path) == (1, 5, str(picture))


def test_without_a_network_a_run_is_recorded_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    fake = planted(monkeypatch, "online")
    with caplog.at_level(logging.WARNING):
        running = tracker(tmp_path)
    running.log(line(1, 100.0, loss=1.0))
    assert fake.modes == ["online", "offline"]
    assert len(fake.runs[0].logged) == 1
    assert caplog.text.count("recorded offline") == 1
    assert "planted-secret-value" not in caplog.text
    assert "wandb sync" in running.finish(Ending(), [])


def test_a_missing_package_or_account_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, wandb: FakeWandb):
    online, offline, disabled = (RLConfig(wandb={"mode": mode}).wandb for mode in ("online", "offline", "disabled"))
    assert online
    assert offline
    assert disabled
    assert missing_for_wandb(online) is None
    monkeypatch.setattr(FakeWandb.api, "api_key", None)
    assert "`wandb login`, set WANDB_API_KEY" in str(missing_for_wandb(online))
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install turnwise[wandb]" in str(missing_for_wandb(offline))
    assert missing_for_wandb(disabled) is None
