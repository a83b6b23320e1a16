"""Results as lines on a terminal or in a file, while they come in, and as JSON."""

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec
from rich.console import Console
from rich.padding import Padding
from rich.status import Status
from rich.table import Table
from rich.text import Text

from turnwise import __version__
from turnwise.config import RLConfig
from turnwise.diagnose.core import Check, Result, Verdict, first_failure
from turnwise.diagnose.text_checks.excerpt import CLOSE, OPEN

STYLES = {
    Verdict.PASS: "green",
    Verdict.WARN: "yellow",
    Verdict.FAIL: "bold red",
    Verdict.BLOCKED: "dim",
    Verdict.SKIPPED: "dim",
}
MARK_WIDTH, NAME_WIDTH = 8, 19
INDENT = MARK_WIDTH + NAME_WIDTH
PATIENCE_S = 15.0  # between two lines that say the same with other numbers
TRAINED = re.compile(f"({OPEN}.*?{CLOSE})")


class View(Protocol):
    """Where a person watches the checks."""

    def begin(self, check: Check) -> None: ...
    def say(self, text: str) -> None: ...
    def tell(self, result: Result) -> None: ...
    def close(self) -> None: ...


class TerminalView:
    """Results in colours, and below them what is being done."""

    def __init__(self, console: Console) -> None:
        self._console, self._name = console, ""
        self._status = Status("", console=console)
        self._status.start()

    def begin(self, check: Check) -> None:
        self._name = check.name
        self._status.update(f"{check.name}: {check.question}")

    def say(self, text: str) -> None:
        self._status.update(f"{self._name}: {text}")

    def tell(self, result: Result) -> None:
        verdict, finding = result.finding.verdict, result.finding
        grid = Table.grid(expand=False)
        grid.add_column(width=MARK_WIDTH, style=STYLES[verdict])
        grid.add_column(width=NAME_WIDTH, style="bold" if verdict is not Verdict.BLOCKED else "dim")
        grid.add_column(overflow="fold")
        grid.add_row(mark(verdict), result.check.name, Text(finding.evidence, style=_quiet(verdict)))
        if finding.remedy:
            grid.add_row("", "", Text(f"-> {finding.remedy}", style="cyan"))
        self._console.print(grid)
        for line in finding.lines:
            self._console.print(Padding(coloured(line), (0, 0, 0, INDENT + 2)))

    def close(self) -> None:
        self._status.stop()


class PlainView:
    """A line each, for files and pipes."""

    def __init__(self, console: Console) -> None:
        self._console, self._name = console, ""
        self._said, self._when = "", 0.0

    def begin(self, check: Check) -> None:
        self._name = check.name

    def say(self, text: str) -> None:
        kind, now = re.sub(r"\d+", "", text), time.monotonic()
        if kind != self._said or now - self._when > PATIENCE_S:
            self._said, self._when = kind, now
            self._print(f"{'...':<{MARK_WIDTH}}{self._name}: {text}")

    def tell(self, result: Result) -> None:
        for line in plain_lines(result):
            self._print(line)

    def close(self) -> None:
        pass

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def make_view(console: Console) -> View:
    return TerminalView(console) if console.is_terminal else PlainView(console)


def mark(verdict: Verdict) -> str:
    """In capitals where somebody should look."""
    return str(verdict).upper() if verdict in (Verdict.WARN, Verdict.FAIL) else str(verdict)


def plain_lines(result: Result) -> Iterator[str]:
    """A result as text: verdict, name and evidence; remedy and details below."""
    finding = result.finding
    yield f"{mark(finding.verdict):<{MARK_WIDTH}}{result.check.name:<{NAME_WIDTH}}{finding.evidence}"
    if finding.remedy:
        yield f"{'':<{INDENT}}-> {finding.remedy}"
    for line in finding.lines:
        yield f"{'':<{INDENT}}  {line}"


def coloured(line: str) -> Text:
    """A line of details: what stands in the brackets of an excerpt is bright, the rest is not."""
    text = Text()
    for part in TRAINED.split(line):
        text.append(part, style="bold green" if part.startswith(OPEN) else "dim")
    return text


def conclusion(results: Sequence[Result], seconds: float) -> str:
    """The last line: how many of each, and which failure names the fault."""
    counts = Counter(result.finding.verdict for result in results)
    words = {Verdict.PASS: "passed", Verdict.WARN: "with a warning", Verdict.FAIL: "failed"}
    told = ", ".join(f"{counts[verdict]} {words.get(verdict, verdict)}" for verdict in Verdict if counts[verdict])
    failed = first_failure(results)
    return f"{told} in {seconds:.0f} s." + (f" The fault is named by the first to fail: {failed.check.name}." if failed else "")


def document(results: Sequence[Result], config: RLConfig, seconds: float) -> dict[str, Any]:
    """Everything as plain values, for `--json` and the report."""
    failed = first_failure(results)
    return {
        "turnwise": __version__,
        "model": config.model.name,
        "environments": [env.id for env in config.orchestrator.env],
        "seconds": round(seconds, 1),
        "first_failure": failed.check.name if failed else None,
        "checks": [
            {
                "name": result.check.name,
                "question": result.check.question,
                "needs": list(result.check.needs),
                "verdict": str(result.finding.verdict),
                "evidence": result.finding.evidence,
                "remedy": result.finding.remedy,
                "blocked_by": result.blocked_by,
                "seconds": round(result.seconds, 3),
                "data": dict(result.finding.data),
                "lines": list(result.finding.lines),
            }
            for result in results
        ],
    }


def as_json(content: dict[str, Any]) -> bytes:
    """Indented JSON; numbers that JSON lacks become null."""
    return msgspec.json.format(msgspec.json.encode(content, enc_hook=_plain), indent=2) + b"\n"


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy, and whatever else a check measured."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _quiet(verdict: Verdict) -> str:
    return "dim" if verdict in (Verdict.BLOCKED, Verdict.SKIPPED) else ""
