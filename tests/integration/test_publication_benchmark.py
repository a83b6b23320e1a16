"""The publication benchmark on the tiny shape: the real processes on a CPU, and numbers that add up."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "publication.py"
PARTS = {"lora": {"write", "notice", "load", "digest"}, "full": {"announce", "pause", "transfer", "digest", "resume"}}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("publication")
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--device", "cpu", "--repeats", "2", "--in-flight", "0", "3"]
    done = subprocess.run(
        [*command, "--scratch", str(folder), "--json", str(folder / "out.json")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((folder / "out.json").read_text())
    assert all(f"| {row['in_flight']} |" in done.stdout for row in report["rows"])
    return report


def test_each_kind_is_measured_idle_and_under_load(report: dict[str, Any]):
    assert [(row["kind"], row["in_flight"]) for row in report["rows"]] == [("lora", 0), ("lora", 3), ("full", 0), ("full", 3)]
    for row in report["rows"]:
        assert len(row["repeats"]) == 2
        assert (row["tokens_meanwhile"] > 0) == (row["in_flight"] > 0)


def test_the_parts_make_up_the_time_from_the_trainers_tensors_to_engines_that_serve_them(report: dict[str, Any]):
    for row in report["rows"]:
        for times in row["repeats"]:
            parts = {part: times[part] for part in times.keys() - {"total"}}
            assert parts.keys() == PARTS[row["kind"]]
            assert all(seconds > -0.01 for seconds in parts.values())  # `notice` is read off clocks of two processes
            counted = sum(parts.values()) - parts.get("announce", 0.0)
            assert 0 < counted <= times["total"] + 0.01
