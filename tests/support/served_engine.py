"""Engines as `rl` would start them: the embedded one, and a real vLLM server where `TURNWISE_VLLM_PYTHON` names one."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from turnwise.config import RLConfig
from turnwise.config.files import dump_toml
from turnwise.inference import InferenceClient
from turnwise.inference.launcher import check_engine, engine_commands

STARTUP_S = 600.0  # vLLM on two busy cores
ENGINES = ["embedded", pytest.param("vllm", marks=pytest.mark.vllm)]
SLOTS = 3  # adapters that an engine serves side by side


@dataclass
class Served:
    """A running engine."""

    kind: str
    url: str
    model: Path

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))

    def wait_until_running(self) -> None:
        deadline = time.monotonic() + 60.0
        while self.metric("vllm:num_requests_running") == 0:
            assert time.monotonic() < deadline, "no request began to run"
            time.sleep(0.005)


def dtype_of(kind: str) -> str:
    """Of the weights in tests of both engines: vLLM computes in bfloat16, as on GPUs."""
    return "bfloat16" if kind == "vllm" else "float32"


@contextmanager
def started(
    kind: str,
    model: Path,
    folder: Path,
    *,
    lora: dict[str, Any] | None,
    dtype: str = "float32",
    noise: dict[str, Any] | None = None,
) -> Generator[Served]:
    """vLLM gets a cache of more adapters than it has slots, so that a loaded adapter may be in none."""
    config = RLConfig.model_validate(
        {
            "output_dir": folder,
            "seq_len": 511,
            "model": {"name": str(model), "dtype": dtype},
            "inference": {
                "engine": kind,
                "port": _free_port(),
                "dp": 1,
                "max_loras": SLOTS,
                "noise": noise,
                "embedded": {"threads": 1},
                "vllm": {"max_cpu_loras": 8} if lora else {},
            },
            "trainer": {"model": {"lora": lora}},
        }
    )
    check_engine(config)
    (folder / "config.toml").write_text(dump_toml(config))
    command = engine_commands(config, folder / "config.toml", gpus=[])[0]
    log = folder / "engine.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command.argv, env=os.environ | command.env, stdout=file, stderr=subprocess.STDOUT)
    try:
        _wait_healthy(command.url, process, log)
        yield Served(kind, command.url, model)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def connected(served: Served) -> InferenceClient:
    return InferenceClient([served.url], model=str(served.model), request_timeout_s=120.0, max_retries=0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + STARTUP_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the engine did not start:\n{log.read_text(errors='replace')[-4000:]}")
