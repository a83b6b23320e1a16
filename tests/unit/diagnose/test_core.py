"""The order of checks, what blocks what, and which failure is told."""

from collections.abc import Callable
from pathlib import Path

import pytest

from turnwise.config import ConfigError, RLConfig
from turnwise.diagnose.checks import CHECKS, chosen
from turnwise.diagnose.context import Context, artefact
from turnwise.diagnose.core import Check, CheckFailed, Finding, Result, Verdict, first_failure, run_checks
from turnwise.diagnose.notes import Notes


def check(name: str, *needs: str, finding: Finding | None = None, run: Callable[[Context], Finding] | None = None) -> Check:
    return Check(name, f"Is {name} right?", needs, run or (lambda context: finding or Finding(Verdict.PASS, "fine")))


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(RLConfig(), tmp_path, lambda text: None)


def verdicts(results: list[Result]) -> list[tuple[str, str, str | None]]:
    return [(result.check.name, str(result.finding.verdict), result.blocked_by) for result in results]


def test_a_failure_blocks_what_stands_on_it_however_long_the_chain(context: Context):
    checks = [
        check("one", finding=Finding(Verdict.FAIL, "broken")),
        check("two", "one"),
        check("three", "two"),
        check("apart"),
    ]
    results = run_checks(checks, context, lambda result: None)
    expected = [("one", "fail", None), ("two", "blocked", "one"), ("three", "blocked", "one"), ("apart", "pass", None)]
    assert verdicts(results) == expected
    assert first_failure(results) is results[0]


def test_a_warning_and_a_skipped_check_block_nothing(context: Context):
    checks = [
        check("one", finding=Finding(Verdict.WARN, "odd")),
        check("two", finding=Finding(Verdict.SKIPPED, "not here")),
        check("three", "one", "two"),
    ]
    results = run_checks(checks, context, lambda result: None)
    assert results[-1].finding.verdict is Verdict.PASS
    assert first_failure(results) is None


def test_an_exception_is_a_failure_that_names_its_place(context: Context):
    def broken(context: Context) -> Finding:
        raise ZeroDivisionError("planted")

    (result,) = run_checks([check("one", run=broken)], context, lambda result: None)
    assert result.finding.verdict is Verdict.FAIL
    assert "ZeroDivisionError: planted" in result.finding.evidence
    assert "test_core.py" in result.finding.evidence
    assert result.finding.lines[0] == "Traceback (most recent call last):"
    assert not any("\n" in line for line in result.finding.lines)


def test_two_checks_that_stand_on_the_same_missing_thing_tell_it_once(context: Context):
    failure = CheckFailed("no such thing", "get one")

    def missing(context: Context) -> Finding:
        raise failure

    results = run_checks([check("one", run=missing), check("two", run=missing)], context, lambda result: None)
    assert verdicts(results) == [("one", "fail", None), ("two", "blocked", "one")]
    assert results[0].finding.remedy == "get one"


def test_each_check_is_announced_before_it_runs_and_told_after(context: Context):
    seen: list[str] = []
    checks = [check("one", finding=Finding(Verdict.FAIL, "broken")), check("two", "one"), check("three")]
    run_checks(checks, context, lambda r: seen.append(f"told {r.check.name}"), lambda c: seen.append(f"began {c.name}"))
    assert seen == ["began one", "told one", "told two", "began three", "told three"]


def test_a_check_that_needs_a_later_one_is_a_mistake_of_ours(context: Context):
    with pytest.raises(ValueError, match="'one' needs 'two', which does not come before it"):
        run_checks([check("one", "two"), check("two")], context, lambda result: None)


def test_every_check_needs_only_checks_before_it_and_asks_a_question():
    names: list[str] = []
    for one in CHECKS:
        assert set(one.needs) <= set(names)
        assert one.question.endswith("?")
        names.append(one.name)
    assert len(set(names)) == len(names)


def test_chosen_checks_bring_what_they_need():
    assert [one.name for one in chosen(["advantages"], CHECKS)] == [
        *("plan", "template", "environment", "rollouts", "reward", "advantages")
    ]
    assert chosen([], CHECKS) == list(CHECKS)


def test_an_unknown_check_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"there is no check 'rewards'\. Did you mean 'reward'\?.*plan, template"):
        chosen(["rewards"], CHECKS)


def test_the_gravest_note_decides_and_every_remedy_is_told_once():
    notes = Notes()
    assert notes.finding("all well", {"n": 1}) == Finding(Verdict.PASS, "all well", "", {"n": 1}, ())
    notes.warn("a is odd", "mend a")
    assert notes.finding("all well").evidence == "all well; a is odd"
    notes.fail("b is broken", "mend b")
    notes.fail("c is broken", "mend b")
    found = notes.finding("all well")
    assert (found.verdict, found.evidence, found.remedy) == (
        Verdict.FAIL,
        "b is broken; c is broken; a is odd",
        "mend a; mend b",
    )


class Workshop:
    """Counts how often things are made."""

    def __init__(self) -> None:
        self.made = 0

    @artefact
    def thing(self) -> int:
        """A number."""
        self.made += 1
        return self.made

    @artefact
    def broken(self) -> int:
        """Cannot be made."""
        self.made += 1
        raise ConfigError("there is no material")

    @artefact
    def unforeseen(self) -> int:
        """Breaks."""
        self.made += 1
        raise ZeroDivisionError("planted")


def test_an_artefact_is_made_once_and_can_be_replaced():
    workshop = Workshop()
    assert (workshop.thing, workshop.thing, workshop.made) == (1, 1, 1)
    workshop.thing = 7
    assert workshop.thing == 7


@pytest.mark.parametrize(("name", "told"), [("broken", "there is no material"), ("unforeseen", "ZeroDivisionError: planted")])
def test_a_failure_to_make_an_artefact_is_remembered(name: str, told: str):
    workshop = Workshop()
    failures: list[CheckFailed] = []
    for _ in range(2):
        with pytest.raises(CheckFailed, match=told) as raised:
            getattr(workshop, name)
        failures.append(raised.value)
    assert failures[0] is failures[1]
    assert workshop.made == 1
