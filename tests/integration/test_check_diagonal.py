"""All checks with a real engine and a real trainer, each time with one fault: the first check to fail is the one about it.

Engine and trainer run in this process. Faults that show before the trainer is needed are in tests/unit/diagnose.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support import faulty_engine, planted_probe
from support.probed import probe_here
from turnwise.config import RLConfig
from turnwise.diagnose.checks import CHECKS
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Result, Verdict, first_failure, run_checks
from turnwise.diagnose.session import OpenEngines
from turnwise.transport import RunDir, WeightsStore

PAGE = Path(__file__).parents[2] / "docs" / "check.md"
NAMES = [check.name for check in CHECKS]
LOOKED_AT = [check for check in CHECKS if NAMES.index(check.name) <= NAMES.index("served")]  # overfit is a run of its own


@dataclass(frozen=True)
class Planted:
    """A fault of the trainer, of the engine, or of the configuration."""

    name: str
    check: str
    trainer: Callable[[planted_probe.Patch], None] = lambda patch: None
    engine: faulty_engine.Fault = "none"

    def __str__(self) -> str:
        return self.name


FAULTS = [
    Planted("temperature applied on one side only", "logprobs", planted_probe.ignored_temperature),
    Planted("LoRA frozen", "gradient", planted_probe.frozen_adapter),
    Planted("one layer's LoRA frozen", "gradient", planted_probe.frozen_layer),
    Planted("a backward pass that is not that of the loss", "finite-differences", planted_probe.wrong_backward),
    Planted("learning rate zero", "update", planted_probe.zero_learning_rate),
    Planted("an update that does not reach the weights", "update", planted_probe.lost_update),
    Planted("adapter never loaded", "served", engine="not applied"),
    Planted("an old adapter served", "served", engine="version before"),
    Planted("half of the adapter served", "served", engine="half of it"),
]


class Here(Context):
    """With engine and trainer in this process."""

    engine: faulty_engine.Fault = "none"

    def open_engines(self) -> OpenEngines:
        return faulty_engine.faulty_engine(self.config, WeightsStore(RunDir(self.config.output_dir).weights), self.engine)

    @property
    def probe(self) -> Any:
        if "probed" not in self.__dict__:
            self.__dict__["probed"] = probe_here(self.config, self.batch, self.scratch / "report.json")
        return self.__dict__["probed"]


def results_of(fault: Planted, model: Path, folder: Path) -> list[Result]:
    config = RLConfig.model_validate(
        {
            "output_dir": str(folder / "run"),
            "max_steps": 50,
            "seq_len": 192,
            "model": {"name": str(model), "dtype": "float32"},
            "inference": {"embedded": {"threads": 1}},
            "orchestrator": {
                "batch_size": 16,
                "rollouts_per_example": 8,
                "env": [{"id": "wordle", "args": {"max_turns": 2, "style": "shortlist", "shortlist": 4, "history": "last"}}],
                "sampling": {"temperature": 0.7, "max_tokens": 6},
            },
            "trainer": {"threads": 1, "canaries": 4, "model": {"lora": {"rank": 4, "alpha": 8}}, "optim": {"lr": 1e-2}},
        }
    )
    with Here(config, folder / "scratch", lambda text: None, rollouts=16) as context:
        context.engine = fault.engine
        return run_checks(LOOKED_AT, context, lambda result: None)


def test_nothing_fails_where_nothing_is_wrong(tiny_model: Path, tmp_path: Path):
    results = results_of(Planted("nothing", ""), tiny_model, tmp_path)
    failed = first_failure(results)
    assert failed is None, f"{failed.check.name}: {failed.finding.evidence}"
    assert all(result.finding.verdict is not Verdict.BLOCKED for result in results)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_the_first_check_to_fail_names_the_fault(
    fault: Planted, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fault.trainer(monkeypatch.setattr)
    results = results_of(fault, tiny_model, tmp_path)
    failed = first_failure(results)
    assert failed is not None
    assert failed.check.name == fault.check, failed.finding.evidence
    assert failed.finding.remedy
    assert f"| {fault.name} | {fault.check} |" in PAGE.read_text()
