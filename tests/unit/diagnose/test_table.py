"""Results as lines and as JSON."""

import io
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from turnwise.config import RLConfig
from turnwise.diagnose.core import Check, Finding, Result, Verdict
from turnwise.diagnose.table import PlainView, TerminalView, as_json, coloured, conclusion, document, make_view, plain_lines


def result(
    verdict: Verdict, name: str = "reward", remedy: str = "", data: Mapping[str, Any] | None = None, **more: Any
) -> Result:
    finding = Finding(verdict, "it is so", remedy, data or {}, more.pop("lines", ()))
    return Result(Check(name, "Is it so?", (), lambda context: finding), finding, **more)


def written(terminal: bool, *results: Result, says: tuple[str, ...] = ()) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, no_color=True)
    view = make_view(console)
    for one in results:
        view.begin(one.check)
        for text in says:
            view.say(text)
        view.tell(one)
    view.close()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


def test_a_result_is_a_line_with_its_remedy_and_its_details_below():
    assert list(plain_lines(result(Verdict.FAIL, remedy="mend it", lines=("a", "b")))) == [
        *("FAIL    reward             it is so", f"{'':27}-> mend it", f"{'':27}  a", f"{'':27}  b"),
    ]
    assert list(plain_lines(result(Verdict.PASS))) == ["pass    reward             it is so"]


@pytest.mark.parametrize("terminal", [False, True])
def test_every_result_is_shown_on_a_terminal_and_in_a_file(terminal: bool):
    text = written(terminal, result(Verdict.PASS), result(Verdict.WARN, "mask", "look", lines=("⟦yes⟧ no",)))
    for expected in ("pass", "reward", "WARN", "mask", "-> look", "⟦yes⟧ no"):
        assert expected in text


def test_a_file_hears_of_progress_once_and_not_of_every_number():
    text = written(False, result(Verdict.PASS), says=("1 of 9 rollouts", "2 of 9 rollouts", "starting", "3 of 9 rollouts"))
    assert text.count("rollouts") == 2
    assert "...     reward: 1 of 9 rollouts" in text


def test_a_view_for_a_terminal_is_chosen_on_one():
    assert isinstance(make_view(Console(file=io.StringIO())), PlainView)
    view = make_view(Console(file=io.StringIO(), force_terminal=True))
    assert isinstance(view, TerminalView)
    view.close()


def test_what_trains_is_bright_and_the_rest_is_not():
    text = coloured("said ⟦yes⟧ and ⟦no⟧.")
    assert text.plain == "said ⟦yes⟧ and ⟦no⟧."
    assert [(span.start, span.end) for span in text.spans if "green" in str(span.style)] == [(5, 10), (15, 19)]


def test_the_conclusion_counts_verdicts_and_names_the_first_failure():
    results = [result(Verdict.PASS), result(Verdict.FAIL, "mask"), result(Verdict.BLOCKED, "served", blocked_by="mask")]
    assert conclusion(results, 12.4) == "1 passed, 1 failed, 1 blocked in 12 s. The fault is named by the first to fail: mask."
    assert conclusion(results[:1], 3) == "1 passed in 3 s."


def test_json_holds_everything_and_no_number_that_json_lacks():
    data = {"a": np.float32(0.5), "b": np.arange(3), "c": math.nan, "d": [math.inf], "e": Verdict.PASS}
    content = json.loads(as_json(document([result(Verdict.FAIL, data=data, seconds=1.23456)], RLConfig(), 9.87)))
    (check,) = content["checks"]
    assert (check["name"], check["verdict"], check["seconds"], check["blocked_by"]) == ("reward", "fail", 1.235, None)
    assert check["data"] == {"a": 0.5, "b": [0, 1, 2], "c": None, "d": [None], "e": "pass"}
    assert (content["first_failure"], content["seconds"]) == ("reward", 9.9)
