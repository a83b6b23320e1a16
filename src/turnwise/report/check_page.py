"""What `turnwise check` found, as a page of its own and as a section of a run's report: from check.json in the folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "check.json"
PAGE = "check.md"
LOUD = ("warn", "fail")  # verdicts that are written in capitals


def write_check_page(folder: Path) -> Path:
    """Write check.md beside check.json.

    Raises:
        FileNotFoundError: there is no check.json.
        ValueError: it is no result of a check.
    """
    page = folder / PAGE
    page.write_text(f"# Check\n\n{_body(_read(folder / FILE))}\n", encoding="utf-8")
    return page


def check_section(run_root: Path) -> str:
    """The section of report.md; empty where no check was kept in the run folder."""
    path = run_root / FILE
    if not path.is_file():
        return ""
    try:
        return f"## Check before the run\n\n{_body(_read(path))}"
    except ValueError as error:
        return f"## Check before the run\n\n{error}"


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("checks"), list):
        raise ValueError(f"{path} is no result of `turnwise check`: it lacks a list of checks")
    return content


def _body(content: Mapping[str, Any]) -> str:
    checks: list[Mapping[str, Any]] = content["checks"]
    failed = content.get("first_failure")
    verdict = f"The fault is named by the first check to fail: **{failed}**." if failed else "No check failed."
    told = f"{verdict} {len(checks)} checks in {content.get('seconds', 0):.0f} s, turnwise {content.get('turnwise', '?')}."
    rows = ["| check | verdict | evidence | what to do |", "|---|---|---|---|", *(_row(check) for check in checks)]
    details = [_details(check) for check in checks if check.get("lines")]
    return "\n\n".join([told, "\n".join(rows), *details])


def _row(check: Mapping[str, Any]) -> str:
    verdict = str(check["verdict"])
    cells = (check["name"], f"**{verdict}**" if verdict in LOUD else verdict, check["evidence"], check.get("remedy", ""))
    return f"| {' | '.join(_cell(str(cell)) for cell in cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _details(check: Mapping[str, Any]) -> str:
    """Lines stand as they are: tables in columns, and excerpts of what models and environments write."""
    lines = "\n".join(f"    {line}" for line in check["lines"])
    return f"{check['name']}: {check.get('question', '')}\n\n{lines}"
