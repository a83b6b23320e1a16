"""Each planted fault is named by the check that is about it: the first to fail. These faults show without a trainer."""

from pathlib import Path

import pytest

from support.planted_checks import TEXT_FAULTS, Fault, ScriptedContext, tables
from turnwise.config import RLConfig
from turnwise.diagnose.checks import TEXT_CHECKS
from turnwise.diagnose.core import Result, Verdict, first_failure, run_checks


def results_of(fault: Fault | None, model: Path, folder: Path) -> list[Result]:
    config = RLConfig.model_validate(tables(model, folder, **(fault.orchestrator if fault else {})))
    with ScriptedContext(config, folder / "scratch") as context:
        return run_checks(TEXT_CHECKS, context, lambda result: None)


def test_nothing_fails_where_nothing_is_wrong(tiny_model: Path, tmp_path: Path):
    results = results_of(None, tiny_model, tmp_path)
    assert [r for r in results if r.finding.verdict in (Verdict.FAIL, Verdict.BLOCKED)] == []
    assert [r.check.name for r in results] == ["plan", "template", "environment", "rollouts", "reward", "advantages", "mask"]


@pytest.mark.parametrize("fault", TEXT_FAULTS, ids=str)
def test_the_first_check_to_fail_names_the_fault(fault: Fault, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fault.plant(monkeypatch)
    results = results_of(fault, tiny_model, tmp_path)
    failed = first_failure(results)
    assert failed is not None
    assert failed.check.name == fault.check, failed.finding.evidence
    assert failed.finding.evidence
    for blocked in (result for result in results if result.finding.verdict is Verdict.BLOCKED):
        assert blocked.blocked_by == fault.check


@pytest.mark.parametrize("fault", TEXT_FAULTS, ids=str)
def test_the_page_has_every_fault_beside_its_check(fault: Fault):
    page = Path(__file__).parents[3] / "docs" / "check.md"
    assert f"| {fault.name} | {fault.check} |" in page.read_text()
