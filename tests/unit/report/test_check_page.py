"""What was checked before a run, as a page and in its report."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.planted_run import plant_run
from turnwise.report.check_page import check_section, write_check_page
from turnwise.report.write import write_report

CHECKS: list[dict[str, Any]] = [
    {"name": "plan", "question": "Could it?", "verdict": "pass", "evidence": "4 steps", "remedy": "", "lines": ["8 tasks"]},
    {"name": "reward", "question": "Is it?", "verdict": "fail", "evidence": "a|b\nc", "remedy": "mend", "lines": []},
]
CONTENT = {"turnwise": "1.0", "seconds": 12.3, "first_failure": "reward", "checks": CHECKS}


def keep(folder: Path, content: Any = CONTENT) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "check.json").write_text(json.dumps(content))


def test_the_page_has_a_row_for_each_check_and_the_details_below(tmp_path: Path):
    keep(tmp_path)
    page = write_check_page(tmp_path).read_text()
    assert page.startswith(
        "# Check\n\nThe fault is named by the first check to fail: **reward**. 2 checks in 12 s, turnwise 1.0."
    )
    assert "| plan | pass | 4 steps |  |" in page
    assert "| reward | **fail** | a\\|b c | mend |" in page
    assert "plan: Could it?\n\n    8 tasks" in page
    assert "reward: Is it?" not in page


def test_a_run_without_a_check_has_no_section(tmp_path: Path):
    assert check_section(tmp_path) == ""


@pytest.mark.parametrize("content", ["{", "[]", '{"checks": 1}'])
def test_a_broken_file_is_told_and_does_not_spoil_the_report(tmp_path: Path, content: str):
    (tmp_path / "check.json").write_text(content)
    assert "check.json is" in check_section(tmp_path)
    with pytest.raises(ValueError, match=r"check\.json is"):
        write_check_page(tmp_path)


def test_the_report_of_a_run_says_what_was_checked_before_it(tmp_path: Path):
    root = plant_run(tmp_path / "run")
    assert "Check before the run" not in write_report(root).read_text()
    keep(root)
    report = write_report(root).read_text()
    assert "## Check before the run\n\nThe fault is named by the first check to fail: **reward**." in report
    assert report.index("## Check before the run") < report.index("## To repeat or go on")
