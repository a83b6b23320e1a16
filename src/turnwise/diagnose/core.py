"""Checks in an order, cheapest first: each passes, warns, fails, or is blocked by the one that failed before it."""

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from turnwise.envs.checks import raised_words

if TYPE_CHECKING:
    from turnwise.diagnose.context import Context


class Verdict(StrEnum):
    """What a check found."""

    PASS = "pass"
    WARN = "warn"  # it can learn, but something is likely to disappoint
    FAIL = "fail"  # it cannot learn as it is
    BLOCKED = "blocked"  # not looked at: what it needs has failed
    SKIPPED = "skipped"  # does not apply to this configuration


@dataclass(frozen=True)
class Finding:
    """The answer to a check's question.

    Args:
        verdict: what was found.
        evidence: one sentence with the numbers that were seen.
        remedy: what to change, naming keys; empty when there is nothing to do.
        data: the numbers, for `--json` and the report.
        lines: what a person should look at, shown under the verdict (a rendered mask, a table).
    """

    verdict: Verdict
    evidence: str
    remedy: str = ""
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lines: tuple[str, ...] = ()


class CheckFailed(Exception):
    """What a check stands on could not be made; its text is the evidence."""

    def __init__(self, evidence: str, remedy: str = "", lines: Sequence[str] = ()) -> None:
        super().__init__(evidence)
        self.finding = Finding(Verdict.FAIL, evidence, remedy, lines=tuple(lines))

    @classmethod
    def because(cls, error: Exception) -> "CheckFailed":
        """As which an exception is told that nobody foresaw: with its place, and the traceback as lines."""
        lines = "".join(traceback.format_exception(error)).splitlines()
        return cls(raised_words(error), lines=lines)


@dataclass(frozen=True)
class Check:
    """A hypothesis about a configuration that can be tested.

    Args:
        name: one word or two with hyphens, stable: `blocked by`, `--only` and `--json` use it.
        question: what is asked, as a sentence with a question mark.
        needs: names of checks that must not have failed.
        run: looks, and answers. What it raises becomes a failure of this check.
    """

    name: str
    question: str
    needs: tuple[str, ...]
    run: "Callable[[Context], Finding]"


@dataclass(frozen=True)
class Result:
    """A check with its answer."""

    check: Check
    finding: Finding
    seconds: float = 0.0
    blocked_by: str | None = None  # the first check in the chain of needs that failed


def run_checks(
    checks: Sequence[Check],
    context: "Context",
    tell: Callable[[Result], None],
    begin: Callable[[Check], None] = lambda check: None,
) -> list[Result]:
    """Run checks in their order: `begin` is told each before it is run, `tell` each result as it is there.

    A check that needs one that failed is not run: it is blocked by the failed one, however long the chain between them.
    One that meets a failure that an earlier one has told already is blocked too: both stand on what could not be made.

    Raises:
        ValueError: a check needs one that does not come before it.
    """
    results: dict[str, Result] = {}
    for check in checks:
        if unknown := [name for name in check.needs if name not in results]:
            raise ValueError(f"check {check.name!r} needs {unknown[0]!r}, which does not come before it")
        causes = [cause for name in check.needs if (cause := _cause(results[name])) is not None]
        if causes:
            result = _blocked(check, causes[0])
        else:
            begin(check)
            began = time.perf_counter()
            finding = _answer(check, context)
            met = next((name for name, earlier in results.items() if earlier.finding is finding), None)
            result = Result(check, finding, time.perf_counter() - began) if met is None else _blocked(check, met)
        results[check.name] = result
        tell(result)
    return list(results.values())


def first_failure(results: Sequence[Result]) -> Result | None:
    """The check that names the fault: the first that failed."""
    return next((result for result in results if result.finding.verdict is Verdict.FAIL), None)


def _blocked(check: Check, by: str) -> Result:
    return Result(check, Finding(Verdict.BLOCKED, f"not looked at: {by} failed"), blocked_by=by)


def _cause(result: Result) -> str | None:
    return result.check.name if result.finding.verdict is Verdict.FAIL else result.blocked_by


def _answer(check: Check, context: "Context") -> Finding:
    try:
        return check.run(context)
    except CheckFailed as failure:
        return failure.finding
    except Exception as error:  # a fault of the configuration may show anywhere; a check that breaks is an answer too
        return CheckFailed.because(error).finding
