"""A run in MLflow, against its own client and a store in files where the package is installed."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.fake_mlflow import fake_mlflow
from turnwise.config import RLConfig
from turnwise.monitor.follow import Follower
from turnwise.monitor.mlflow_sink import MlflowTracker, flat, missing_for_mlflow
from turnwise.monitor.secrets import Redactor
from turnwise.monitor.track import Tracking
from turnwise.monitor.tracking import Checkpoint, Ending, StepRecord


def test_tables_become_dotted_keys_and_unset_values_are_left_out():
    tables = {"a": {"b": 1, "c": None}, "env": [{"id": "x"}, {"id": "y"}], "tags": ["p", "q"], "empty": []}
    assert dict(flat(tables)) == {"a.b": "1", "env.0.id": "x", "env.1.id": "y", "tags": "['p', 'q']", "empty": "[]"}


def test_a_missing_package_or_server_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    config = RLConfig(mlflow={})
    assert config.mlflow
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("turnwise.monitor.mlflow_sink.find_spec", lambda name: None)
    assert "pip install turnwise[mlflow]" in str(missing_for_mlflow(config.mlflow))
    monkeypatch.setattr("turnwise.monitor.mlflow_sink.find_spec", lambda name: object())
    assert "MLFLOW_TRACKING_URI" in str(missing_for_mlflow(config.mlflow))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert missing_for_mlflow(config.mlflow) is None


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # version 3 asks for it
    return pytest.importorskip("mlflow")


def tracker(root: Path, **tables: Any) -> MlflowTracker:
    tables = {"mlflow": {"tracking_uri": f"file://{root}/mlruns", "tags": {"team": "a"}}, **tables}
    config = RLConfig(output_dir=root, run_name="first try", inference={"vllm": {"api_key": "planted-secret-value"}}, **tables)
    assert config.mlflow
    return MlflowTracker(config, config.mlflow, Redactor(config.model_dump(mode="json"), {}))


def test_a_run_and_its_resumption_are_one_run_with_all_its_points(mlflow: Any, tmp_path: Path):
    first = tracker(tmp_path, max_steps=2)
    for step in (1, 2):
        first.log(StepRecord(step, 100.0 + step, {"actor/loss": float(step)}))
    second = tracker(tmp_path, max_steps=3)
    second.log(StepRecord(1, 101.0, {"actor/loss": 1.0}))
    second.log(StepRecord(2, 202.0, {"actor/loss": 20.0}))
    adapter = tmp_path / "checkpoints" / "step_2" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    second.checkpoint(Checkpoint(2, adapter.parent, 1.0, True, 0.5))
    (tmp_path / "report.md").write_text("planted-secret-value")
    second.finish(Ending("done", "all steps done", 0, {"verdict": "learning"}), [tmp_path / "report.md"])

    client = mlflow.MlflowClient(tracking_uri=f"file://{tmp_path}/mlruns")
    assert first.run_id == second.run_id
    run = client.get_run(first.run_id)
    points = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "actor/loss")]
    assert points == [(1, 1.0), (2, 2.0), (2, 20.0)]
    assert (run.info.run_name, run.info.status) == ("first try", "FINISHED")
    assert (run.data.params["max_steps"], run.data.params["inference.vllm.api_key"]) == ("2", "***")
    told = {key: run.data.tags[key] for key in ("team", "best", "latest", "outcome", "verdict")}
    assert told == {"team": "a", "best": "adapter/step_2", "latest": "adapter/step_2", "outcome": "done", "verdict": "learning"}
    stored = {path.name: path.read_bytes() for path in (tmp_path / "mlruns").rglob("artifacts/**/*") if path.is_file()}
    assert stored == {"adapter_model.safetensors": b"weights", "report.md": b"***"}
    assert b"planted-secret-value" not in b"".join(p.read_bytes() for p in (tmp_path / "mlruns").rglob("*") if p.is_file())
    assert json.loads((tmp_path / "tracking" / "mlflow.json").read_text())["until"] == 202.0


def test_a_server_that_was_away_gets_every_number_once_over_http(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def write(step: int) -> None:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "time": 100.0 + step, "actor/loss": step / 2}) + "\n")

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    redactor, config, now = Redactor({}, {}), RLConfig(output_dir=tmp_path, max_steps=4), 0.0
    with fake_mlflow() as server:
        makers = {
            "MLflow": (
                lambda: tracker(tmp_path, mlflow={"tracking_uri": server.url}),
                lambda: Follower(config, redactor, samples=0, interval=None),
            )
        }
        following = Tracking(redactor, makers, again=("MLflow",), clock=lambda: now)
        for step in (1, 2, 3, 4):
            write(step)
            server.away = step in (2, 3)
            now += 40.0
            following.catch_up()
        places = following.finish(Ending("done", "all steps done", 0))
    assert server.refused
    assert [(metric["step"], metric["value"]) for metric in server.runs["run0"]["metrics"]] == [(n, n / 2) for n in (1, 2, 3, 4)]
    keys = [param["key"] for param in server.runs["run0"]["params"]]
    assert "model.name" in keys
    assert len(keys) == len(set(keys))
    assert (list(server.runs), server.runs["run0"]["status"], server.runs["run0"]["tags"]["outcome"]) == (
        ["run0"],
        "FINISHED",
        "done",
    )
    assert places["MLflow"] is not None
    assert caplog.text.count("MLflow does not answer as it should") == 1
