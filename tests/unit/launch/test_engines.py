"""Engines without a run: started, waited for, and ended whatever happens."""

import asyncio
import sys
import time
from pathlib import Path

import pytest

from turnwise.config import ConfigError, RLConfig
from turnwise.launch import engines
from turnwise.launch.engines import Engines
from turnwise.launch.gpus import Machine
from turnwise.launch.plan import ProcessSpec
from turnwise.launch.survivors import RUN_ID, processes_of


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes engines of one process that runs some code instead."""

    def make(code: str, *, timeout_s: float = 30.0) -> Engines:
        def specs(config: RLConfig, shared: dict[str, str], machine: Machine) -> list[ProcessSpec]:
            argv = (sys.executable, "-c", code)
            log = tmp_path / "logs" / "inference.stdout"
            return [ProcessSpec("inference", argv, shared, tmp_path, log, (), "http://127.0.0.1:9/health")]

        monkeypatch.setattr(engines, "engines", specs)
        config = RLConfig.model_validate({"output_dir": tmp_path, "inference": {"startup_timeout_s": timeout_s}})
        return Engines(config, Machine(), run_id=tmp_path.name)

    return make


def test_an_engine_that_ends_is_told_with_its_last_lines(engine, tmp_path: Path):
    with (
        pytest.raises(ConfigError, match=r"inference ended with exit code 3\. Its last lines:\nno room"),
        engine("print('no room', flush=True); raise SystemExit(3)") as started,
    ):
        asyncio.run(started.serving())
    assert processes_of(tmp_path.name) == []


def test_an_engine_that_does_not_answer_is_given_up(engine, tmp_path: Path):
    with (
        pytest.raises(ConfigError, match=r"did not serve within 1 s; raise inference\.startup_timeout_s"),
        engine("import time; time.sleep(60)", timeout_s=1.0) as started,
    ):
        asyncio.run(started.serving())
    assert processes_of(tmp_path.name) == []


def test_everything_that_an_engine_starts_ends_with_the_block(engine, tmp_path: Path):
    child = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
    )
    with engine(child) as started:
        assert started.urls == ["http://127.0.0.1:9"]
        assert started.children[0].spec.env[RUN_ID] == tmp_path.name
        deadline = time.monotonic() + 30
        while len(processes_of(tmp_path.name)) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    assert processes_of(tmp_path.name) == []
    assert started.children[0].exit_code() is not None
