"""W&B in real runs: what an offline run and its resumption leave in W&B's own files, and faults that a run must not notice."""

import json
from pathlib import Path

import pytest

from support.rl_command import finish, write_config
from support.wandb_files import Recorded, recorded_runs
from turnwise.config import RLConfig
from turnwise.launch.resolve import write_resolved
from turnwise.launch.tracking import TrackingProcess
from turnwise.monitor.tracking import Ending

SECRET = "planted-0123456789-secret"
FLAGS = ("--wandb.mode", "offline", "--wandb.group", "tries", "--wandb.tags", '["cpu"]', "--ckpt.interval", "1")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Run folder of two steps and of a third after a resume, tracked offline."""
    folder = tmp_path_factory.mktemp("tracked")
    config = write_config(folder, tiny_model, max_steps=2, max_staleness=0)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WANDB_API_KEY", SECRET.ljust(40, "0"))
        environment.setenv("JUDGE_API_KEY", SECRET)
        output = finish(folder, "@", str(config), *FLAGS, "--inference.vllm", json.dumps({"hint": f"--with {SECRET}"}))
        assert "recorded offline; `wandb sync" in output
        (folder / "run" / "metrics.before").write_bytes((folder / "run" / "metrics.jsonl").read_bytes())
        finish(folder, "@", str(config), "--resume", "--max-steps", "3")
    return folder / "run"


@pytest.fixture(scope="module")
def starts(resumed: Path) -> list[Recorded]:
    return recorded_runs(resumed)


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_starts_are_one_run_whose_rows_go_on(resumed: Path, starts: list[Recorded]):
    assert [start.run_id for start in starts] == [(resumed / "wandb_id").read_text().strip()] * 2
    numbers = [row["_step"] for start in starts for row in start.history]
    assert numbers == sorted(set(numbers))
    assert [(start.group, start.tags, start.exit_code) for start in starts] == [("tries", ["cpu"], 0)] * 2


def test_the_history_is_the_metrics_file_and_no_line_is_lost_or_sent_twice(resumed: Path, starts: list[Recorded]):
    before, after = lines(resumed / "metrics.before"), lines(resumed / "metrics.jsonl")
    for start, expected in zip(starts, (before, [line for line in after if line not in before]), strict=True):
        rows = [{name: value for name, value in row.items() if isinstance(value, int | float)} for row in start.history]
        found = [{**row, "time": row["_timestamp"]} for row in rows if len(row) > 4]  # pictures have no numbers of their own
        assert [{name: row[name] for name in line} for row, line in zip(found, expected, strict=True)] == expected
        assert start.names() == {name for line in expected for name in line} - {"time"}
        assert start.axes == {"step": "", "*": "step"}


def test_rollouts_are_tables_with_what_each_turn_earned(resumed: Path, starts: list[Recorded]):
    tables = [(row["step"], name) for start in starts for row in start.history for name in row if name.startswith("samples/")]
    assert sorted(set(tables)) == [
        *((0, "samples/held_out"), (1, "samples/train"), (2, "samples/held_out"), (2, "samples/train")),
        *((3, "samples/held_out"), (3, "samples/train")),
    ]
    files = sorted(resumed.glob("wandb/offline-run-*/files/media/table/samples/train_*.table.json"))
    content = [json.loads(file.read_text()) for file in files]
    assert [[row[0] for row in table["data"]] for table in content] == [[1] * 4, [2] * 4, [3] * 4]
    row = dict(zip(content[0]["columns"], content[0]["data"][0], strict=True))
    assert row["env"] == "wordle"
    assert "[assistant, " in row["conversation"]


def test_adapters_and_the_report_are_artefacts_with_aliases(starts: list[Recorded]):
    first, *_ = starts[0].aliases("adapter")
    assert sorted(first) == ["latest", "step-1"]
    assert {alias for start in starts for aliases in start.aliases("adapter") for alias in aliases} >= {
        *("step-1", "step-2", "step-3", "latest", "best"),
    }
    files = {name.split("-")[0]: set(files) for name, _, files in starts[1].artifacts}
    assert files["adapter"] == {"adapter_config.json", "adapter_model.safetensors"}
    assert {"report.md", "report/changes.json"} < files["report"]
    assert any(name.endswith(".png") for name in files["report"])


def test_the_summary_says_how_the_run_ended_and_the_config_what_it_was(starts: list[Recorded]):
    assert [start.config["max_steps"] for start in starts] == [2, 3]
    assert [start.summary["outcome"] for start in starts] == ["done", "done"]
    assert starts[1].summary["verdict"] == "too early"
    assert starts[1].summary["best_step"] in (0, 2, 3)


def test_no_secret_is_in_anything_that_could_be_uploaded_or_was_logged(resumed: Path, starts: list[Recorded]):
    assert starts[0].config["inference"]["vllm"] == {"hint": "--with ***"}
    for folder in ("wandb", "logs", "tracking"):
        for path in (resumed / folder).rglob("*"):
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


FAULTY_WANDB = """
import time
class api: api_key = "k"
class Settings:
    def __init__(self, **options): pass
class Run:
    def define_metric(self, *names, **options): pass
    def finish(self, **options): time.sleep(600)
    summary = {{}}
    id = "x"
def init(**options):
    {init}
    return Run()
"""


def tracked_with(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> TrackingProcess:
    """A real tracker of an empty run, with this code for the package `wandb`."""
    (folder / "wandb.py").write_text(package)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    config = RLConfig(output_dir=folder / "run", max_steps=1, wandb={}, monitor={"upload_timeout_s": 0.5})
    (folder / "run").mkdir()
    write_resolved(config, folder / "run" / "config.toml")
    return TrackingProcess(config)


@pytest.mark.parametrize("init", ["pass", "time.sleep(600)"], ids=["finish", "init"])
def test_a_service_that_hangs_holds_the_end_of_a_run_up_no_longer_than_it_may(
    init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tracker, said = tracked_with(FAULTY_WANDB.format(init=init), tmp_path, monkeypatch), list[str]()
    tracker.conclude(Ending("done", "all steps done", 0), said.append)
    assert any("exit code 3" in line for line in said)
    assert "not all was uploaded within monitor.upload_timeout_s = 0.5" in said[-1]


def test_a_service_that_refuses_is_told_of_and_a_tracker_ends_with_its_rl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tracker = tracked_with(FAULTY_WANDB.format(init="raise OSError('no route')"), tmp_path, monkeypatch)
    assert tracker._process.stdin is not None
    tracker._process.stdin.close()  # as when `rl` is killed: nobody says how the run ended
    assert tracker._process.wait(60) == 0
    assert tracker.log.read_text().count("no route") == 2  # once for the service, once for giving up
