"""What starts the probe, with other processes in its place: what is told meanwhile, and how failures are explained."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.batches import make_batch
from support.probed import SETTING, judged, probed_config
from turnwise.diagnose import probe_run
from turnwise.diagnose.core import CheckFailed, Verdict
from turnwise.diagnose.probe_report import Agreement, Logprobs, ProbeReport, Scanned, write_report
from turnwise.diagnose.probe_run import NAME, run_probe
from turnwise.launch.gpus import Machine
from turnwise.launch.plan import ProcessSpec, trainer_spec
from turnwise.transport import Batch

NOTHING = Machine((), None, None)
LOGPROBS = Logprobs(Agreement(1e-6, 1e-5, 0.0, 0.0, 1.0), [Scanned(0.7, 1e-6, 1e-6)], [Scanned(0.0, 1e-6, 0.0)], 0.1)
MEASURED = ProbeReport(setting=SETTING, stage="gradient", logprobs=LOGPROBS)

Run = Callable[..., ProbeReport]


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]) -> Run:
    """`run(script, left=report)`: the script stands for torchrun, and the report is what it leaves."""

    def start(script: str, *, left: ProbeReport | None = None, timeout_s: float = 60.0) -> ProbeReport:
        def fake(*args: Any, name: str, arguments: Sequence[str], **more: Any) -> ProcessSpec:
            spec = trainer_spec(*args, name=name, arguments=arguments, **more)
            if left is not None:
                write_report(Path(arguments[-1]), left)
            return ProcessSpec(name, (sys.executable, "-c", script), spec.env, Path.cwd(), spec.log)

        monkeypatch.setattr(probe_run, "trainer_spec", fake)
        config = probed_config(tmp_path, tmp_path, trainer={"timeout_s": timeout_s})
        return run_probe(config, make_batch(1), told.append, machine=NOTHING)

    return start


def test_stages_are_told_as_they_come_and_the_report_is_read(run: Run, told: list[str], tmp_path: Path) -> None:
    script = "print('[rank 0] probe: logprobs'); print('[rank 1] probe: no'); print('[rank 0] probe: gradient')"
    whole = msgspec.structs.replace(MEASURED, stage="")
    report = run(script, left=whole)
    assert told == ["starting the trainer's processes", "measuring logprobs", "measuring gradient"]
    assert report == msgspec.structs.replace(whole, log=str(tmp_path / "logs" / f"{NAME}.stdout"))


def test_the_batch_and_the_configuration_are_there_for_the_processes(run: Run, tmp_path: Path) -> None:
    run("", left=MEASURED)
    written = msgspec.msgpack.decode((tmp_path / "probe" / "batch.msgpack").read_bytes(), type=Batch)
    assert written == make_batch(1)
    assert (tmp_path / "config.toml").exists()


def test_a_model_that_does_not_load_fails_with_the_words_of_the_process(run: Run) -> None:
    script = "print('[rank 0] error: model.name cannot be loaded: no such file'); raise SystemExit(1)"
    with pytest.raises(CheckFailed) as caught:
        run(script)
    finding = caught.value.finding
    assert finding.verdict is Verdict.FAIL
    assert finding.evidence == "model.name cannot be loaded: no such file"
    assert "trainer_probe.stdout" in finding.remedy
    assert finding.lines[-1].endswith("no such file")


def test_an_exception_is_explained_by_what_is_known_of_it(run: Run) -> None:
    script = "print('[rank 0] torch.OutOfMemoryError: CUDA out of memory. Tried'); raise SystemExit(1)"
    with pytest.raises(CheckFailed) as caught:
        run(script)
    assert "CUDA out of memory" in caught.value.finding.evidence
    assert "trainer.micro_batch_tokens" in caught.value.finding.remedy


def test_what_was_measured_before_a_failure_is_judged_and_the_next_check_names_it(run: Run) -> None:
    said = "out of memory while gradient was measured: the CPU's memory is full. What helps: a seq_len below 128"
    report = run(f'print("[rank 0] error: {said}"); raise SystemExit(1)', left=MEASURED)
    assert judged(report, "logprobs").verdict is Verdict.PASS
    finding = judged(report, "gradient")
    assert finding.verdict is Verdict.FAIL
    assert finding.evidence.startswith("the gradient was not measured: out of memory while gradient")
    assert finding.remedy == "a seq_len below 128"
    assert finding.lines == (f"[rank 0] error: {said}",)


def test_a_report_of_an_earlier_probe_is_not_taken_for_this_one(run: Run, tmp_path: Path) -> None:
    write_report(tmp_path / "probe" / "report.json", MEASURED)
    with pytest.raises(CheckFailed, match="left no report"):
        run("")


def test_processes_that_hang_are_ended(run: Run) -> None:
    with pytest.raises(CheckFailed, match=r"nothing new for 2 times trainer\.timeout_s"):
        run("import time; time.sleep(60)", timeout_s=0.05)
