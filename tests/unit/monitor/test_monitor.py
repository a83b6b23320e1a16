"""Metrics on their way to JSONL, TensorBoard and W&B, read back from where they went."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from turnwise.config import RLConfig
from turnwise.monitor import Monitor, console_line, read_metrics
from turnwise.monitor.sinks import JsonlSink


def config(**tables: Any) -> RLConfig:
    return RLConfig(run_name="first try", **{"monitor": {"tensorboard": False}, **tables})


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_each_call_is_one_line_that_can_be_read_at_once(tmp_path: Path) -> None:
    monitor = Monitor(config(), tmp_path)
    monitor.log(1, {"actor/loss": 0.5, "critic/reward/mean": np.float32(1.5), "rollouts/errored/count": 2})
    monitor.log(1, {"val-core/wordle/reward/mean": 0.25})
    lines = list(read_metrics(tmp_path / "metrics.jsonl"))
    monitor.close()
    monitor.close()
    assert [line["step"] for line in lines] == [1, 1]
    assert lines[0]["critic/reward/mean"] == 1.5
    assert lines[0]["rollouts/errored/count"] == 2
    assert lines[1]["val-core/wordle/reward/mean"] == 0.25
    assert lines[0]["time"] > 1.7e9


def test_values_that_are_not_finite_become_null_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = Monitor(config(), tmp_path)
    with caplog.at_level(logging.WARNING):
        monitor.log(1, {"actor/loss": float("nan"), "actor/kl": float("inf"), "actor/lr": 0.1})
        monitor.log(2, {"actor/loss": float("nan")})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    first, second = map(json.loads, text.splitlines())
    assert (first["actor/loss"], first["actor/kl"], first["actor/lr"]) == (None, None, 0.1)
    assert (first["monitor/nonfinite/count"], second["monitor/nonfinite/count"], monitor.nonfinite) == (2, 1, 3)
    assert caplog.text.count("actor/loss is nan") == 1


def test_a_value_that_is_no_number_is_refused_with_its_name(tmp_path: Path) -> None:
    monitor = Monitor(config(), tmp_path)
    with pytest.raises(TypeError, match=r"metric actor/loss of step 3 is 'high'"):
        monitor.log(3, {"actor/loss": "high"})  # type: ignore[dict-item]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_resumed_run_appends_and_a_torn_line_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Monitor(config(), tmp_path).log(1, {"actor/loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "actor/lo')
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    with caplog.at_level(logging.WARNING):
        Monitor(config(), tmp_path).log(2, {"actor/loss": 2.0})
    assert [(line["step"], line["actor/loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0)]
    assert "cut off" in caplog.text


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        list(read_metrics(path))


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from turnwise.monitor.sinks import JsonlSink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
sink = JsonlSink(Path(sys.argv[1]))
try:
    for step in range(1, 100):
        sink.log(step, {"actor/loss": 0.5})
except OSError as error:
    print(step, error)
"""


def test_a_full_disk_leaves_whole_lines_and_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    failed = int(done.stdout.split()[0])
    assert "could not be recorded" in done.stdout
    assert str(path) in done.stdout
    assert path.read_bytes().endswith(b"\n")
    assert [line["step"] for line in read_metrics(path)] == list(range(1, failed))
    JsonlSink(path).log(failed, {"actor/loss": 0.5})  # once there is room again
    assert [line["step"] for line in read_metrics(path)][-1] == failed


def test_tensorboard_holds_the_same_names_and_values(tmp_path: Path) -> None:
    monitor = Monitor(config(monitor={"tensorboard": True}), tmp_path)
    monitor.log(0, {"val-core/wordle/reward/mean": -0.5})
    monitor.log(1, {"actor/loss": 0.25, "actor/entropy": float("nan")})
    monitor.log(2, {"actor/loss": 0.125})
    found = scalars(tmp_path / "tensorboard" / "first_try")
    monitor.close()
    assert found == {
        "val-core/wordle/reward/mean": [(0, -0.5)],
        "actor/loss": [(1, 0.25), (2, 0.125)],
        "monitor/nonfinite/count": [(1, 1)],
    }


def test_tensorboard_of_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    settings = config(monitor={"tensorboard": True})
    first = Monitor(settings, tmp_path)
    for step in (1, 2, 3, 4):
        first.log(step, {"actor/loss": 10.0 + step})
    first.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))  # resumed from the checkpoint of step 2
    second = Monitor(settings, tmp_path)
    second.log(3, {"actor/loss": 23.0})
    second.close()
    assert scalars(tmp_path / "tensorboard" / "first_try")["actor/loss"] == [(1, 11.0), (2, 12.0), (3, 23.0)]


def test_a_view_that_fails_is_left_out_and_the_record_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Unplugged:
        calls = 0

        def log(self, step: int, metrics: object) -> None:
            self.calls += 1
            raise ConnectionError("network is down")

        def close(self) -> None:
            raise ConnectionError("network is down")

    monitor, view = Monitor(config(), tmp_path), Unplugged()
    monitor._views.append(view)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            monitor.log(step, {"actor/loss": 1.0})
    monitor.close()
    assert view.calls == 1
    assert "network is down" in caplog.text
    assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == 3


def test_the_console_line_shows_what_was_measured() -> None:
    metrics = {"critic/reward/mean": 0.5312, "actor/loss": -0.01234, "groups/equal_reward/share": 0.25, "timing/step_s": 21.04}
    assert console_line(12, metrics, max_steps=60) == "step 12/60 | reward 0.531 | loss -0.0123 | equal 25% | s 21.0"
    evaluation = {"val-core/wordle/reward/mean": 0.4, "val-core/wordle/reward/stderr": 0.05}
    assert console_line(0, evaluation) == "step 0 | val-core/wordle/reward/mean 0.400 ±0.050"


def test_monitoring_loads_neither_torch_nor_tensorboard_before_it_is_used() -> None:
    code = "import sys, turnwise.monitor; print([m for m in ('torch', 'tensorboard', 'wandb', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
