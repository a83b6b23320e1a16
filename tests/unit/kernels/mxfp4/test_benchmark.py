"""The benchmark of the kernels runs where there is no GPU, so that it works when there is one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[4] / "benchmarks" / "mxfp4.py"


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    output = folder / "result.json"
    command = [sys.executable, str(SCRIPT), "--shapes", "64x128", "--tokens", "1", "3", "--json", str(output), *arguments]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(output.read_text())
    return result


@pytest.mark.parametrize("limit", [100.0, 0.0])
def test_every_part_is_measured_or_said_to_be_left_out(tmp_path: Path, limit: float):
    result = run(tmp_path, "--peers", "eager decode", "humming", "--time-limit", str(limit))
    measured = {(row["part"], row["name"]) for row in result["rows"]}
    if limit:
        assert {("dequantise", "mxfp4"), ("forward", "bf16"), ("forward", "mxfp4"), ("dX", "mxfp4")} <= measured
        assert {("forward", "eager decode"), ("LoRA r32", "shared by 3, forward + backward")} <= measured
        decoding = {row["name"]: row for row in result["rows"] if row["part"] == "dequantise"}
        as_many = decoding["copy of as many bytes"]["microseconds"] / decoding["mxfp4"]["microseconds"]
        assert decoding["mxfp4"]["of_copy_of_as_many"] == pytest.approx(as_many)
        assert sum("its bytes at the speed of a copy" in line for line in result["lines"]) == 2  # of own A, and of shared
        problems = [line for line in result["lines"] if "not measured" in line or "left out" in line]
        assert [line.partition(": No")[0] for line in problems] == ["not measured: humming: ModuleNotFoundError"]
    else:
        assert measured == set()
        assert any("left out: the time limit was met" in line for line in result["lines"])


def test_the_crossover_is_looked_for(tmp_path: Path):
    result = run(tmp_path, "--measure-crossover")
    assert {row["name"] for row in result["rows"]} == {"fused", "decoded"}
    assert any(line.startswith("CROSSOVERS[(64, 128)] = ") for line in result["lines"])


def test_what_is_compared_takes_turns():
    spec = importlib.util.spec_from_file_location("_kernel_timing", SCRIPT.with_name("_kernel_timing.py"))
    assert spec is not None
    assert spec.loader is not None
    timing = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = timing
    spec.loader.exec_module(timing)
    clock = timing.Clock(torch.device("cpu"), limit=10.0)
    called: list[str] = []
    one = clock.prepared("one", [lambda: called.append("one")])
    two = clock.prepared("two", [lambda: called.append("two"), lambda: called.append("two")])
    called.clear()
    seconds = clock.medians([one, two])
    assert called == ["one", "two", "two"] * (len(called) // 3)
    assert len(called) >= 9
    assert len(seconds) == 2
    assert min(seconds) > 0
