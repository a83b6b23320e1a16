"""The HParams page of TensorBoard, asked as the page itself asks for it."""

import warnings
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import plugin_data_pb2
from werkzeug.test import Client

from turnwise.config import RLConfig
from turnwise.monitor.tensorboard_sink import HPARAMS, TensorBoardSink

HELD_OUT = "val-core/wordle/reward/mean"


def run(folder: Path, *, lr: float, reward: float, steps: int = 2, resume_step: int | None = None) -> None:
    config = RLConfig(
        max_steps=2, trainer={"optim": {"lr": lr}}, orchestrator={"env": [{"id": "wordle", "args": {"api_key": "planted"}}]}
    )
    sink = TensorBoardSink(folder, config, resume_step=resume_step)
    sink.log(0, {HELD_OUT: 0.0})
    for step in range(1, steps + 1):
        sink.log(step, {"critic/reward/mean": 0.1 * step, "actor/loss": 1.0})
    sink.log(steps, {HELD_OUT: reward})
    sink.close()


def sessions(folder: Path) -> dict[str, Any]:
    """What the page shows, by run, through the routes of the plugin."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a library inside tensorboard, when it is loaded
        from tensorboard.plugins.hparams.hparams_plugin import HParamsPlugin
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    plugin = HParamsPlugin(TBContext(logdir=str(folder), multiplexer=multiplexer, data_provider=provider))
    routes = plugin.get_plugin_apps()
    asked = {"allowedStatuses": ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING"], "sliceSize": 10}
    answer = Client(routes["/session_groups"]).post("/", json=asked)
    assert answer.status_code == 200, answer.text
    return {group["name"]: group for group in answer.json["sessionGroups"]}


def metrics(group: Any) -> dict[str, float]:
    return {value["name"]["tag"]: round(value["value"], 4) for value in group["metricValues"]}


def test_runs_are_compared_by_their_values_and_final_rewards(tmp_path: Path):
    run(tmp_path / "one", lr=1e-4, reward=0.25)
    run(tmp_path / "two", lr=1e-5, reward=0.75)
    found = sessions(tmp_path)
    assert {name: group["hparams"]["trainer.optim.lr"] for name, group in found.items()} == {"one": 1e-4, "two": 1e-5}
    assert {name: metrics(group) for name, group in found.items()} == {
        "one": {HELD_OUT: 0.25, "critic/reward/mean": 0.2},
        "two": {HELD_OUT: 0.75, "critic/reward/mean": 0.2},
    }
    one = found["one"]["hparams"]
    assert set(one) == {*HPARAMS, "environments"}
    assert (one["environments"], one["trainer.loss.kind"], one["trainer.loss.clip_low"]) == ("wordle", "grpo", 0.2)
    assert [group["sessions"][0]["status"] for group in found.values()] == ["STATUS_SUCCESS"] * 2


def test_a_run_that_was_interrupted_has_no_end_and_goes_on_as_one_record(tmp_path: Path):
    run(tmp_path / "one", lr=1e-4, reward=0.1, steps=1)
    assert sessions(tmp_path)["one"]["sessions"][0]["status"] != "STATUS_SUCCESS"
    run(tmp_path / "one", lr=1e-4, reward=0.5, resume_step=2)
    (group,) = sessions(tmp_path).values()
    assert group["sessions"][0]["status"] == "STATUS_SUCCESS"
    assert metrics(group)[HELD_OUT] == 0.5


def test_the_record_is_in_the_event_files_and_holds_no_secret(tmp_path: Path):
    run(tmp_path / "one", lr=1e-4, reward=0.25)
    events = EventAccumulator(str(tmp_path / "one"))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["orchestrator.batch_size"].number_value == 32
    assert all(b"planted" not in path.read_bytes() for path in (tmp_path / "one").iterdir())
