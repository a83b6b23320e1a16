"""The probe under the very torchrun command of a run, over two ranks."""

from pathlib import Path

import pytest

from support.probed import probe_here, probed_config, scored_batch, trainer_results
from turnwise.diagnose.core import Verdict
from turnwise.diagnose.probe_run import run_probe
from turnwise.launch.gpus import Machine
from turnwise.transport import RunDir, WeightsStore


def test_two_ranks_measure_what_one_process_does(tmp_path: Path, tiny_model: Path) -> None:
    batch = scored_batch(tiny_model)
    told: list[str] = []
    config = probed_config(tmp_path / "two", tiny_model, trainer={"processes": 2})
    two = run_probe(config, batch, told.append, machine=Machine((), None, None))
    assert [result.finding.verdict for result in trainer_results(two)] == [Verdict.PASS] * 5
    assert told[1] == "measuring logprobs"
    assert two.setting.ranks == len(two.cost.memory if two.cost else []) == 2
    assert WeightsStore(RunDir(tmp_path / "two").weights).versions() == [0, 1]
    one = probe_here(probed_config(tmp_path / "one", tiny_model), batch, tmp_path / "report.json")
    assert one.gradient is not None
    assert two.gradient is not None
    assert two.gradient.norms == pytest.approx(one.gradient.norms, rel=1e-4, abs=1e-9)
    assert one.update is not None
    assert two.update is not None
    assert (two.update.weights, two.update.changed) == (one.update.weights, one.update.changed)
    assert two.update.norm == pytest.approx(one.update.norm, rel=1e-4)
    assert one.rewarded is not None
    assert two.rewarded is not None
    assert two.rewarded.observed == pytest.approx(one.rewarded.observed, rel=0.01)
