"""A sweep in numbers and pages: means, standard errors, questions, tables, pictures, all from planted curves."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.config.sweep import SweepConfig
from turnwise.report.page import Table
from turnwise.report.run import Metrics
from turnwise.report.sweep import Comparison, RunState, Score, SweepRow, answers, caution, compare, scores_of
from turnwise.report.sweep_page import write_comparison, write_status
from turnwise.report.sweep_plots import band, draw_sweep
from turnwise.report.sweep_tables import comparison_table, status_table

ACC = "val-core/openai/gsm8k/acc/mean"
ERROR = 0.0122  # of one run of GSM8K at 0.73: sqrt(0.73 * 0.27 / 1319)


def sweep_of(*ids: str, **keys: Any) -> SweepConfig:
    runs = [{"id": name, "title": f"experiment {name}"} for name in ids]
    return SweepConfig.model_validate({"name": "planted", "output_dir": "x", "metric": ACC, "percent": True, "run": runs, **keys})


def row(
    experiment: str, seed: int, final: float, *, state: RunState = RunState.COMPLETE, stderr: float | None = ERROR
) -> SweepRow:
    scores = (Score(0.4, 0, stderr), Score(final + 0.01, 20, stderr), Score(final, 29, stderr))
    return SweepRow(
        f"{experiment}-s{seed}", experiment, "", seed, Path("/runs"), state, step=29, max_steps=29, scores=scores, attempts=1
    )


def planted(final: float, seed: int) -> Metrics:
    """A run of 29 steps: accuracy at 0, 20 and 29, and training curves with noise."""
    rng = random.Random(seed)
    metrics: Metrics = {0: {ACC: 0.4, ACC.replace("mean", "stderr"): ERROR}}
    for step in range(1, 30):
        values = {"actor/entropy": 1.0 - step / 60 + rng.gauss(0, 0.02), "critic/reward/mean": 0.4 + step / 100}
        if step in (20, 29):
            values |= {ACC: final - (29 - step) / 100, ACC.replace("mean", "stderr"): ERROR}
        metrics[step] = values
    return metrics


def test_the_mean_and_its_error_are_over_the_seeds_of_complete_runs():
    rows = [row("a", 0, 0.70), row("a", 1, 0.72), row("a", 2, 0.77), row("a", 3, 0.1, state=RunState.ENDED_EARLY)]
    (a,) = compare(sweep_of("a"), rows)
    assert a.values == (0.70, 0.72, 0.77)
    assert a.mean == pytest.approx(0.73)
    assert a.seed_stderr == pytest.approx(stdev([0.70, 0.72, 0.77]) / math.sqrt(3))
    assert a.stderr == a.seed_stderr
    assert (a.unfinished, a.task_stderr, a.best) == (1, pytest.approx(ERROR), pytest.approx(0.74))


def test_one_seed_has_the_error_of_its_tasks():
    (a,) = compare(sweep_of("a"), [row("a", 0, 0.70)])
    assert (a.seed_stderr, a.stderr) == (None, pytest.approx(ERROR))


def test_seeds_that_agree_by_luck_are_not_believed_below_what_the_tasks_alone_give():
    (a,) = compare(sweep_of("a"), [row("a", seed, 0.70) for seed in range(4)])
    assert (a.seed_stderr, a.stderr) == (0.0, pytest.approx(ERROR / 2))


def test_an_experiment_without_a_complete_run_has_no_mean():
    (a,) = compare(sweep_of("a"), [row("a", 0, 0.7, state=RunState.FAILED)])
    assert (a.mean, a.stderr, a.best, a.unfinished) == (None, None, None, 1)


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [(0.80, 0.73, "rose"), (0.66, 0.73, "fell"), (0.755, 0.73, "unchanged"), (0.70, 0.73, "unchanged")],
)
def test_questions_are_answered_against_the_error_of_the_difference(ours: float, theirs: float, verdict: str):
    sweep = sweep_of("a", "b", compare=[["a", "b"]])
    (answer,) = answers(sweep, compare(sweep, [row("a", 0, ours), row("b", 0, theirs)]))
    assert (answer.name, answer.verdict) == ("a against b", verdict)
    assert answer.difference == pytest.approx(ours - theirs)
    assert answer.stderr == pytest.approx(ERROR * math.sqrt(2))


def test_a_question_about_a_run_that_is_not_done_stays_open():
    sweep = sweep_of("a", "b", compare=[["a", "b"]])
    assert answers(sweep, compare(sweep, [row("a", 0, 0.7)])) == []


def test_the_page_says_what_one_run_of_gsm8k_can_show():
    sweep = sweep_of("a", "b")
    text = caution(sweep, compare(sweep, [row("a", 0, 0.73), row("b", 0, 0.75)]))
    assert "a standard error of about 1.2 points from the evaluated tasks alone" in text
    assert "differ by less than 2.4 points do not differ beyond chance" in text
    assert "--seeds 3" in text
    more = caution(sweep, compare(sweep, [row(name, seed, 0.73) for name in "ab" for seed in range(3)]))
    assert "between seeds (3 runs and more of each)" in more
    bare = caution(sweep, compare(sweep, [row("a", 0, 0.73, stderr=None)]))
    assert bare.startswith("No evaluation came with a standard error")
    nothing = caution(sweep, compare(sweep, [row("a", 0, 0.0, stderr=0.0)]))
    assert nothing.startswith("Every evaluated task got the same score")


def test_experiments_that_are_left_out_of_a_sweep_are_not_compared():
    sweep = sweep_of("a", "b", compare=[["a", "b"]])
    compared = compare(sweep, [row("a", 0, 0.7)])
    assert [one.experiment for one in compared] == ["a"]
    assert answers(sweep, compared) == []


def test_scores_come_from_the_evaluations_alone():
    metrics = {0: {ACC: 0.4}, 5: {"actor/entropy": 1.0}, 10: {ACC: 0.6, ACC.replace("mean", "stderr"): 0.01}}
    assert scores_of(metrics, ACC) == (Score(0.4, 0), Score(0.6, 10, 0.01))


def test_the_status_tells_result_and_best_and_marks_what_is_no_result_yet():
    sweep = sweep_of("a", "b", run=[{"id": "a", "reference": 73.77}, {"id": "b"}])
    early = replace(row("b", 0, 0.5, state=RunState.ENDED_EARLY), step=20, reason="step 20 of 29", attempts=2)
    table = status_table(sweep, [row("a", 0, 0.70), early])
    assert table.heads == ("run", "state", "step", "result", "best (step)", "reference", "remark")
    assert table.rows[0] == ("a-s0", "complete", "29/29", "70.00 ± 1.22", "71.00 ± 1.22 (20)", "73.77", "")
    assert table.rows[1][1:4] == ("ended early", "20/29", "50.00 ± 1.22 @29")
    assert table.rows[1][-1] == "step 20 of 29 (2 starts)"
    judged = status_table(sweep, [row("a", 0, 0.7), replace(early, verdict="flat")])
    assert [cells[judged.heads.index("verdict")] for cells in judged.rows] == ["", "flat"]
    assert (
        "reference, full" in status_table(sweep.model_copy(update={"overlays": [Path("short.toml")]}), [row("a", 0, 0.7)]).heads
    )


def test_a_metric_that_is_no_share_is_shown_as_it_is():
    sweep = sweep_of("a", percent=False)
    table = comparison_table(sweep, [Comparison((1.25,), None, 0.5, "a", "", 0, 1.5)])
    assert table.rows[0][table.heads.index("mean")] == "1.25"


@given(st.lists(st.lists(st.text(alphabet="ab|–\\ ", max_size=4), min_size=3, max_size=3), min_size=1, max_size=4))
def test_every_markdown_row_has_as_many_cells_as_there_are_heads(cells: list[list[str]]):
    table = Table(("x", "y", "z"), tuple(map(tuple, cells)), frozenset({1}))
    for line in table.markdown().splitlines():
        assert line.replace("\\|", "").count("|") == 4
    assert len(table.without_empty_columns().rows) == len(cells)


def test_a_band_covers_the_steps_that_all_seeds_reached():
    steps, means, spread = band([([0, 10, 20], [1.0, 2.0, 9.0]), ([0, 10], [3.0, 4.0])])
    assert (steps, means) == ([0, 10], [2.0, 3.0])
    assert spread == pytest.approx([stdev([1.0, 3.0]), stdev([2.0, 4.0])])
    assert band([([0, 5], [1.0, 2.0])]) == ([0, 5], [1.0, 2.0], [0.0, 0.0])


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    return imread(path)


def colours(path: Path) -> int:
    """Distinct saturated colours of a picture."""
    image = (pixels(path)[..., :3] * 255).astype(int).reshape(-1, 3)
    saturated = image[image.max(axis=1) - image.min(axis=1) > 60]
    return len({tuple(pixel // 24) for pixel in saturated})


def test_each_metric_is_a_picture_with_a_line_for_each_experiment(tmp_path: Path):
    one = draw_sweep({"a": [planted(0.7, 0)]}, [ACC, "actor/entropy", "no/such/metric"], tmp_path / "one", title="one")
    six = draw_sweep({name: [planted(0.7 + i / 50, i)] for i, name in enumerate("abcdef")}, [ACC], tmp_path / "six", title="six")
    assert [name for name, _ in one] == [ACC, "actor/entropy"]
    assert one[0][1] == tmp_path / "one" / "val-core_openai_gsm8k_acc_mean.png"
    for _, path in (*one, *six):
        assert pixels(path).shape[0] > 300
        assert pixels(path).std() > 0.02
    assert colours(six[0][1]) > colours(one[0][1])


def test_seeds_make_a_band(tmp_path: Path):
    alone = draw_sweep({"a": [planted(0.7, 0)]}, [ACC], tmp_path / "alone", title="t")[0][1]
    three = draw_sweep({"a": [planted(0.6 + seed / 10, seed) for seed in range(3)]}, [ACC], tmp_path / "three", title="t")[0][1]
    tinted = [float(((pixels(path)[..., 2] - pixels(path)[..., 0]) > 0.03).mean()) for path in (alone, three)]
    assert tinted[1] > 4 * tinted[0]


class Tags(HTMLParser):
    """Checks that tags close in order, and collects cells and pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells = self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.cells += tag == "td"
        self.images += tag == "img" and str(dict(attrs)["src"]).startswith("data:image/png;base64,")
        if tag not in ("meta", "img", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_pages_hold_the_comparison_the_questions_the_runs_and_the_curves(tmp_path: Path):
    sweep = sweep_of("a", "b", compare=[["a", "b"]], overlays=["short.toml"], plots=["actor/entropy"])
    rows = [row(name, seed, final) for name, final in (("a", 0.80), ("b", 0.73)) for seed in range(2)]
    rows.append(row("b", 2, 0.1, state=RunState.FAILED))
    metrics = {one.label: planted(one.scores[-1].value, one.seed) for one in rows}
    path = write_comparison(tmp_path, sweep, rows, metrics, ["max_steps: 58 -> 100", "seq_len: 2560 -> <768>"])
    text = path.read_text()
    for expected in (
        "1 of 5 runs are not complete; they enter no mean.",
        "These are not the full experiments. Overlays or flags changed:\n\n- `max_steps: 58 -> 100`",
        "| a | experiment a | 2 | 80.00 | 0.86 |",
        "| a against b | +7.00 | 1.22 | +5.7 | better |",
        "| b-s2 |",
        "![actor/entropy](pictures/actor_entropy.png)",
    ):
        assert expected in text, expected
    assert (tmp_path / "pictures" / "actor_entropy.png").is_file()
    page = (tmp_path / "comparison.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert (tags.open, tags.images) == ([], 2)
    assert tags.cells > 40
    assert "&lt;768&gt;" in page
    assert "<em>no difference beyond chance</em>" in page
    numbers = json.loads((tmp_path / "comparison.json").read_text())
    assert [one["mean"] for one in numbers["experiments"]] == pytest.approx([0.80, 0.73])
    assert numbers["answers"][0]["verdict"] == "rose"


def test_the_status_is_kept_as_markdown_and_json(tmp_path: Path):
    sweep = sweep_of("a", "b")
    write_status(tmp_path, sweep, [row("a", 0, 0.7), SweepRow("b-s0", "b", "", 0, Path("/runs/b"))])
    assert "1 pending, 0 running, 1 complete, 0 ended early, 0 failed" in (tmp_path / "status.md").read_text()
    told = json.loads((tmp_path / "status.json").read_text())
    assert told["runs"][0]["result"] == {"value": 0.7, "step": 29, "stderr": ERROR}
    assert told["runs"][0]["best"]["step"] == 20
    assert (told["runs"][1]["state"], told["runs"][1]["result"], told["runs"][1]["folder"]) == ("pending", None, "/runs/b")


@pytest.mark.parametrize("kept", [lambda seeds: fmean(seeds), min])
def test_one_good_seed_does_not_stand_for_an_experiment(kept: Callable[[list[float]], float]):
    finals = [0.60, 0.80]
    (a,) = compare(sweep_of("a"), [row("a", seed, final) for seed, final in enumerate(finals)])
    assert a.mean is not None
    assert kept(finals) <= a.mean < max(finals)
