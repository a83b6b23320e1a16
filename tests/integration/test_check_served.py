"""The check `served` with a real trainer's version and real engines, right ones and ones with a planted fault."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.batches import make_batch
from support.faulty_engine import Fault, faulty_engine
from support.probed import SETTING
from turnwise.config import RLConfig
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Check, Result, Verdict, run_checks
from turnwise.diagnose.probe_report import ProbeReport, Published
from turnwise.diagnose.served import SERVED
from turnwise.diagnose.session import OpenEngines
from turnwise.trainer.loop import run_trainer
from turnwise.transport import BatchLog, RunDir, WeightsReady, WeightsStore

LORA: dict[str, Any] = {"rank": 6, "alpha": 9.0}


def config_of(model: Path, folder: Path, lora: dict[str, Any] | None) -> RLConfig:
    tables = {
        "output_dir": str(folder),
        "max_steps": 1,
        "seq_len": 512,
        "model": {"name": str(model), "dtype": "float32"},
        "inference": {"embedded": {"threads": 1}},
        "orchestrator": {"env": [{"id": "wordle"}]},
        "trainer": {"threads": 1, "canaries": 4, "optim": {"lr": 1e-2}, "model": {"lora": lora}},
    }
    return RLConfig.model_validate(tables)


def train(config: RLConfig) -> WeightsReady:
    """Version 1, published as in a run."""
    run_dir = RunDir(config.output_dir)
    BatchLog(run_dir.batches).write(make_batch(1, groups=4, group_size=4, prompt_tokens=40))
    run_trainer(config)
    ready = WeightsStore(run_dir.weights).poll(1)
    assert ready is not None
    return ready


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> WeightsReady:
    return train(config_of(tiny_model, tmp_path_factory.mktemp("lora"), LORA))


class PublishedContext(Context):
    """With an engine of the fault in this process, and a version that a trainer has published."""

    fault: Fault

    def __init__(self, config: RLConfig, scratch: Path, ready: WeightsReady, fault: Fault) -> None:
        super().__init__(config, scratch, lambda text: None)
        self.fault, self.store = fault, WeightsStore(Path(ready.path).parent)
        self.probe = ProbeReport(setting=SETTING, published=Published(ready, 1.0, 0.1))  # pyright: ignore[reportAttributeAccessIssue]
        self.batch = make_batch(1)  # pyright: ignore[reportAttributeAccessIssue]

    def open_engines(self) -> OpenEngines:
        return faulty_engine(self.config, self.store, self.fault)


@contextmanager
def checked(config: RLConfig, scratch: Path, ready: WeightsReady, fault: Fault) -> Generator[tuple[Result, Context]]:
    alone = Check(SERVED.name, SERVED.question, (), SERVED.run)
    with PublishedContext(config, scratch, ready, fault) as context:
        (result,) = run_checks([alone], context, lambda result: None)
        yield result, context


def test_a_right_engine_shows_the_update(tiny_model: Path, adapter: WeightsReady, tmp_path: Path):
    with checked(config_of(tiny_model, tmp_path, LORA), tmp_path, adapter, "none") as (result, context):
        assert result.finding.verdict is Verdict.PASS, result.finding.evidence
        assert "shows 1.00 of the trainer's update" in result.finding.evidence
        assert context.session.policy.version == 1
        assert context.footprint.ram == 0  # no process of its own carries the run's mark


@pytest.mark.parametrize(
    ("fault", "share", "words"),
    [
        ("not applied", 0.0, "it computes with the version before"),
        ("version before", 0.0, "it computes with the version before"),
        ("half of it", 0.5, "a part of it is missing"),
    ],
)
def test_an_engine_that_computes_with_another_adapter_fails(
    fault: Fault, share: float, words: str, tiny_model: Path, adapter: WeightsReady, tmp_path: Path
):
    with checked(config_of(tiny_model, tmp_path, LORA), tmp_path, adapter, fault) as (result, _):
        assert result.finding.verdict is Verdict.FAIL
        assert result.finding.data["engines"][0]["share"] == pytest.approx(share, abs=0.35 if share else 1e-3)
        assert "holds the tensors that were published" in result.finding.evidence
        assert words in result.finding.remedy


def test_an_engine_that_holds_another_adapter_fails_by_its_digest(tiny_model: Path, adapter: WeightsReady, tmp_path: Path):
    with checked(config_of(tiny_model, tmp_path, LORA), tmp_path, adapter, "version before held") as (result, _):
        assert result.finding.verdict is Verdict.FAIL
        assert "holds tensors with the digest" in result.finding.evidence
        assert "engine and trainer must read the same files" in result.finding.remedy


def test_an_adapter_that_is_not_there_is_told_with_what_the_engine_says(tiny_model: Path, adapter: WeightsReady, tmp_path: Path):
    gone = WeightsReady(version=1, kind="lora", path=str(tmp_path / "gone"), digest=adapter.digest)
    with checked(config_of(tiny_model, tmp_path, LORA), tmp_path, gone, "none") as (result, _):
        assert result.finding.verdict is Verdict.FAIL
        assert "version 1 could not be served" in result.finding.evidence
        assert str(tmp_path / "gone") in result.finding.evidence


def test_full_weights_are_reloaded_and_shown(tiny_model: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    ready = train(config_of(tiny_model, tmp_path / "run", None))
    assert ready.kind == "full"
    with checked(config_of(tiny_model, tmp_path / "scratch", None), tmp_path / "scratch", ready, "none") as (result, _):
        assert result.finding.verdict is Verdict.PASS, result.finding.evidence
        assert "shows 1.00 of the trainer's update" in result.finding.evidence
