"""The publication benchmark on the tiny shape: the real processes on a CPU, and numbers that add up."""

import asyncio
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.fake_trainer import publish
from support.scripted_engine import ScriptedEngine
from turnwise.orchestrator.weights import Policy
from turnwise.transport import WeightsReady, WeightsStore

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "publication.py"
PARTS = {"lora": {"write", "notice", "slot", "load", "digest"}, "full": {"announce", "pause", "transfer", "digest", "resume"}}
CLIENT = {"model": "base", "request_timeout_s": 5.0, "max_retries": 0}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("publication")
    command = [sys.executable, str(SCRIPT), "--shape", "tiny", "--device", "cpu", "--repeats", "2", "--in-flight", "0", "3"]
    command += ["--interval", "0.01"]
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


class ScriptedTrainer:
    """Publishes at once, and says when."""

    def __init__(self, store: WeightsStore) -> None:
        self.store, self.said = store, []

    def publish(self, version: int) -> None:
        began = time.monotonic()
        publish(self.store, version)
        self.said.append({"began": began, "announced": time.monotonic()})

    async def answer(self) -> dict[str, float]:
        return self.said[-1]


class WatchedPolicy(Policy):
    """Tells when a swap has been asked for."""

    asked: asyncio.Event

    async def swap(self, ready: WeightsReady) -> None:
        self.asked.set()
        await super().swap(ready)


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("publication")


async def test_the_wait_for_an_adapter_slot_is_a_part_of_its_own(tmp_path: Path, benchmark_module: ModuleType):
    store = WeightsStore(tmp_path / "weights")
    async with ScriptedEngine() as engine, benchmark_module.TimedClient([engine.url], **CLIENT) as client:
        policy = WatchedPolicy(client, store, stop_ids=[], max_loaded=2)
        policy.asked = asyncio.Event()
        versions = benchmark_module.Versions(policy, client, ScriptedTrainer(store))
        await versions.next("lora")
        with policy.pinned(0):
            await versions.next("lora")
            policy.asked.clear()
            publication = asyncio.create_task(versions.next("lora"))
            await policy.asked.wait()
            held = time.monotonic()
            await asyncio.sleep(0.05)
            assert engine.admin == ["load v0", "weights_digest", "load v1", "weights_digest"]
            released = time.monotonic()
        times = await publication
        await policy.close()
    assert times.keys() == {"total", *PARTS["lora"]}
    assert times["slot"] >= released - held
    assert times["total"] >= sum(times[part] for part in PARTS["lora"])


async def test_an_interval_passes_between_a_version_that_is_served_and_the_next(tmp_path: Path, benchmark_module: ModuleType):
    store = WeightsStore(tmp_path / "weights")
    trainer = ScriptedTrainer(store)
    async with ScriptedEngine() as engine, benchmark_module.TimedClient([engine.url], **CLIENT) as client:
        policy = Policy(client, store, stop_ids=[])
        versions = benchmark_module.Versions(policy, client, trainer, interval_s=0.05)
        await versions.next("lora")
        served = time.monotonic()
        await versions.next("lora")
        await policy.close()
    assert trainer.said[1]["began"] - served >= 0.05 - 1e-6
