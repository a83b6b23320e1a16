"""The loop in this process: batches in, versions and checkpoints out, and how it ends."""

import threading
import time
from pathlib import Path

import msgspec
import pytest

from support.batches import ConfigOf, make_batch
from turnwise.config import RLConfig
from turnwise.config.files import dump_toml
from turnwise.trainer import loop
from turnwise.trainer.__main__ import main
from turnwise.trainer.checkpoint_index import checkpoint_steps
from turnwise.trainer.loop import run_trainer
from turnwise.trainer.model import ModelError, Policy
from turnwise.transport import BatchLog, Control, Progress, RunDir, WeightsReady, WeightsStore


def write_batches(config: RLConfig, *steps: int) -> RunDir:
    run_dir = RunDir(config.output_dir)
    for step in steps:
        BatchLog(run_dir.batches).write(make_batch(step))
    return run_dir


def ready(run_dir: RunDir, version: int) -> WeightsReady:
    found = WeightsStore(run_dir.weights).poll(version)
    assert found is not None
    return found


def test_a_run_publishes_every_version_and_ends_with_a_checkpoint(
    config_of: ConfigOf, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(max_steps=3, ckpt={"interval": 2})
    run_dir = write_batches(config, 1, 2, 3)
    run_trainer(config)
    assert WeightsStore(run_dir.weights).versions() == [0, 1, 2, 3]
    assert ready(run_dir, 0).metrics == {}
    metrics = ready(run_dir, 3).metrics
    assert metrics["timing/step_s"] >= metrics["timing/train_s"] > 0
    assert 0 <= metrics["perf/trainer_idle/share"] <= 1
    assert {"actor/loss", "actor/grad_norm", "actor/kl", "mismatch/logprob_abs/max", "timing/publish_s"} <= metrics.keys()
    assert checkpoint_steps(run_dir.root) == [2, 3]
    progress = msgspec.msgpack.decode((run_dir.checkpoint(3) / "orchestrator.msgpack").read_bytes(), type=Progress)
    assert progress == make_batch(3).progress
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/3", "2/3", "3/3"]


def test_a_model_of_which_nothing_trains_is_refused(config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Policy, "trainable", lambda self: {})
    with pytest.raises(ModelError, match="no parameter of the model trains"):
        run_trainer(config_of())


def test_a_request_to_stop_ends_a_waiting_trainer_with_a_checkpoint(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "HEARTBEAT_S", 0.05)
    config = config_of(max_steps=9)
    run_dir = write_batches(config, 1)

    def stop_when_idle() -> None:
        while WeightsStore(run_dir.weights).poll(1) is None:
            time.sleep(0.02)
        time.sleep(0.2)  # several heartbeats
        Control(run_dir.root).request_stop("interrupted", "Ctrl-C")

    thread = threading.Thread(target=stop_when_idle)
    thread.start()
    run_trainer(config)
    thread.join()
    assert checkpoint_steps(run_dir.root) == [1]
    assert "stopping after step 1: Ctrl-C" in capsys.readouterr().out


def test_a_request_to_stop_comes_before_a_batch_that_is_there(config_of: ConfigOf) -> None:
    config = config_of()
    run_dir = write_batches(config, 1, 2)
    Control(run_dir.root).request_stop("success", "goal reached")
    run_trainer(config)
    assert WeightsStore(run_dir.weights).versions() == [0]
    assert checkpoint_steps(run_dir.root) == [0]


def test_resuming_forgets_versions_of_the_given_up_lineage_and_replays_batches(config_of: ConfigOf) -> None:
    config = config_of(max_steps=2, ckpt={"interval": 1})
    run_dir = write_batches(config, 1, 2)
    run_trainer(config)
    first = ready(run_dir, 2)
    run_trainer(config, resume_step=1)
    again = ready(run_dir, 2)
    assert again.digest == first.digest
    assert again.metrics["actor/loss"] == first.metrics["actor/loss"]
    assert ready(run_dir, 1).metrics == {}  # published anew at the resume


def test_resuming_a_finished_run_publishes_and_ends(config_of: ConfigOf) -> None:
    config = config_of(max_steps=1)
    run_dir = write_batches(config, 1)
    run_trainer(config)
    before = (run_dir.checkpoint(1) / "meta.json").read_bytes()
    run_trainer(config, resume_step=1)
    assert (run_dir.checkpoint(1) / "meta.json").read_bytes() == before
    assert WeightsStore(run_dir.weights).versions() == [0, 1]


def test_a_batch_without_advantages_makes_a_version_and_a_warning(
    config_of: ConfigOf, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(max_steps=1)
    run_dir = RunDir(config.output_dir)
    BatchLog(run_dir.batches).write(make_batch(1, advantage=0.0))
    run_trainer(config)
    assert ready(run_dir, 1).digest == ready(run_dir, 0).digest
    assert "warning: no sample of batch 1 has an advantage" in capsys.readouterr().out


def start_main(config: RLConfig, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    path = RunDir(config.output_dir).config
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_toml(config))
    monkeypatch.setattr("sys.argv", ["trainer", "--config", str(path), *more])
    return main()


def test_a_batch_that_cannot_be_read_is_an_error_naming_the_file(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of()
    run_dir = write_batches(config, 1)
    (run_dir.batches / "step_2.msgpack").write_bytes(b"\xc1 not a batch")
    assert start_main(config, monkeypatch) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "step_2.msgpack is not a batch" in error
    assert WeightsStore(run_dir.weights).versions() == [0, 1]


def test_a_batch_of_another_step_is_refused(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of()
    run_dir = write_batches(config, 2)
    (run_dir.batches / "step_2.msgpack").rename(run_dir.batches / "step_1.msgpack")
    assert start_main(config, monkeypatch) == 1
    assert "step_1.msgpack holds the batch of step 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("root", "arguments", "message"),
    [
        ({"model": {"name": "/nowhere/model"}}, (), "model.name = '/nowhere/model' is no folder with a model"),
        ({"trainer": {"model": {"lora": {"target_modules": ["qqq"]}}}}, (), "target_modules names ['qqq']"),
        ({"trainer": {"model": {"lora": {"target_modules": ["lm_head"]}}}}, (), "the output layer, which gets no adapter"),
        ({}, ("--resume-step", "7"), "step_7/meta.json is missing"),
    ],
)
def test_bad_input_is_one_clear_message(
    config_of: ConfigOf,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    root: dict[str, object],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert start_main(config_of(**root), monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_model_folder_without_weights_is_named(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    assert start_main(config_of(model={"name": str(tmp_path / "hollow")}), monkeypatch) == 1
    assert "hollow' cannot be loaded" in capsys.readouterr().err
