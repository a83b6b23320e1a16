"""Built-in tasks: what the agent sees holds no answer, evaluators score what they should, and refuse what is no submission."""

import csv
import functools
import io
import json
import operator
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.envs.mlgym.builtin import build
from turnwise.envs.mlgym.builtin.prisoners_dilemma import BadStrategy, choices_in, mean_payoff
from turnwise.envs.mlgym.task import Task, rises, scores_in

EVALUATION = ["--submission_file", "submission.csv"]


def evaluate(task: Task, folder: Path, submission: str, half: str = "test") -> "subprocess.CompletedProcess[str]":
    """Run a task's evaluator beside a submission and the files of one half."""
    for name, content in {**task.workspace, **task.secret[half]}.items():  # type: ignore[index]
        assert isinstance(content, bytes)
        (folder / name).write_bytes(content)
    (folder / "submission.csv").write_text(submission)
    return subprocess.run([sys.executable, task.evaluator, *EVALUATION], cwd=folder, capture_output=True, text=True, timeout=60)


def rows(content: object) -> list[dict[str, str]]:
    assert isinstance(content, bytes)
    return list(csv.DictReader(io.StringIO(content.decode())))


@pytest.fixture(scope="module")
def titanic() -> Task:
    return build("titanic", 0)


def test_the_halves_of_titanic_are_the_hidden_passengers_each_in_one(titanic: Task):
    train, test = rows(titanic.data["train.csv"]), rows(titanic.data["test.csv"])
    assert (len(train), len(test)) == (891, 418)
    assert "Survived" not in test[0]
    assert not {"boat", "body"} & set(train[0])  # both tell who survived
    halves = [[row["PassengerId"] for row in rows(titanic.secret[half]["labels.csv"])] for half in ("validation", "test")]
    assert sorted(functools.reduce(operator.iadd, halves, [])) == sorted(row["PassengerId"] for row in test)
    seen = b"".join(content for content in (*titanic.workspace.values(), *titanic.data.values()) if isinstance(content, bytes))
    assert all(titanic.secret[half]["labels.csv"] not in seen for half in ("validation", "test"))


def test_variants_divide_anew_and_the_same_variant_alike(titanic: Task):
    again, other = build.__wrapped__("titanic", 0), build("titanic", 1)
    assert again == titanic
    assert other.data["train.csv"] != titanic.data["train.csv"]


def test_a_perfect_titanic_submission_scores_1_and_its_complement_0(titanic: Task, tmp_path: Path):
    labels = rows(titanic.secret["test"]["labels.csv"]) + rows(titanic.secret["validation"]["labels.csv"])
    for flip, expected in ((0, 1.0), (1, 0.0)):
        lines = [f"{row['PassengerId']},{int(row['Survived']) ^ flip}" for row in labels]
        done = evaluate(titanic, tmp_path, "\n".join(["PassengerId,Survived", *lines]))
        assert scores_in(done.stdout) == {"accuracy": expected}


def test_the_baseline_of_titanic_is_the_rule_about_women(titanic: Task):
    labels = {row["PassengerId"]: row["Survived"] for row in rows(titanic.secret["test"]["labels.csv"])}
    sexes = {row["PassengerId"]: row["Sex"] for row in rows(titanic.data["test.csv"])}
    right = sum((sexes[passenger] == "female") == (survived == "1") for passenger, survived in labels.items())
    assert titanic.baseline["test"]["accuracy"] == pytest.approx(right / len(labels))


@pytest.mark.parametrize(
    ("submission", "words"),
    [
        ("Id,Survived\n1,1", "no column PassengerId"),
        ("PassengerId,Survived\n", "not in the submission"),
        ("PassengerId,Survived\n" + "\n".join(f"{n},maybe" for n in range(1, 1400)), "must be 0 or 1"),
        ("PassengerId,Survived\n" + "\n".join(f"{n},nan" for n in range(1, 1400)), "must be 0 or 1"),
    ],
)
def test_what_is_no_submission_is_refused_in_words(titanic: Task, tmp_path: Path, submission: str, words: str):
    done = evaluate(titanic, tmp_path, submission)
    assert done.returncode == 1
    assert words in done.stderr
    assert scores_in(done.stdout) is None


def test_the_prisoners_dilemma_pays_defectors_more_than_copycats_and_those_more_than_cooperators():
    always = {move: mean_payoff("0 test", lambda histories, move=move: [move] * len(histories)) for move in (0, 1)}
    assert always[0] < build("prisonersDilemma", 0).baseline["test"]["Score"] < always[1]
    assert always[1] == mean_payoff("0 test", lambda histories: [1] * len(histories))  # seeded
    assert always[1] != mean_payoff("0 validation", lambda histories: [1] * len(histories))


def test_a_strategy_sees_the_rounds_played_so_far_and_its_own_choices_first():
    asked: list[list[tuple[int, int]]] = []

    def ask(histories: Sequence[Sequence[tuple[int, int]]]) -> list[int]:
        asked.extend(list(seen) for seen in histories)
        return [1]

    mean_payoff("x", ask, games=1)
    assert [len(seen) for seen in asked] == list(range(10))
    assert all(own == 1 for own, _ in asked[-1])


@pytest.mark.parametrize("output", ["", "0102", "01", "nan", "0101\nsecret", "{}"])
def test_answers_that_are_no_choices_are_refused(output: str):
    with pytest.raises(BadStrategy, match="must return 0 or 1"):
        choices_in(output, 4)


def test_fashion_mnist_and_house_prices_say_which_data_they_need(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TURNWISE_DATA", raising=False)
    for name, needed in (("imageClassificationFMnist", "fashion_mnist/small"), ("regressionKaggleHousePrice", "ames_housing")):
        with pytest.raises(ValueError, match=f"needs {needed}.*TURNWISE_DATA is not set"):
            build(name, 90)


def test_house_prices_are_scored_by_r2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "ames_housing"
    folder.mkdir()
    lines = [f"{n % 3},{500 + n},{(500 + n) * (100 + 20 * (n % 3))}" for n in range(2200)]
    (folder / "ames_modeldata_2930.csv").write_text("\n".join(["Neighborhood,Gr_Liv_Area,Sale_Price", *lines]))
    monkeypatch.setenv("TURNWISE_DATA", str(tmp_path))
    task = build.__wrapped__("regressionKaggleHousePrice", 0)
    assert task.baseline["test"]["r2"] == pytest.approx(1.0)  # prices made by the baseline's own rule
    labels = rows(task.secret["test"]["labels.csv"])
    mean = sum(float(row["SalePrice"]) for row in labels) / len(labels)
    done = evaluate(task, tmp_path, "\n".join(["Id,SalePrice", *(f"{row['Id']},{mean}" for row in labels)]))
    assert (scores_in(done.stdout) or {})["r2"] == pytest.approx(0.0, abs=1e-9)
    for wrong, words in (("inf", "is inf"), ("many", "no number")):
        text = "\n".join(["Id,SalePrice", *(f"{row['Id']},{wrong}" for row in labels)])
        assert words in evaluate(task, tmp_path, text).stderr


@given(noise=st.lists(st.text(st.characters(blacklist_characters="{\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")), max_size=4))
def test_scores_are_the_last_json_line_whatever_stands_around_it(noise: list[str]):
    output = "\n".join([*noise, json.dumps({"accuracy": 0.1}), json.dumps({"accuracy": 0.5, "note": "x"}), *noise, "{broken"])
    assert scores_in(output) == {"accuracy": 0.5}


def test_improvement_is_signed_by_what_the_metric_means(titanic: Task):
    base = titanic.baseline["test"]["accuracy"]
    assert titanic.improvement(1.0, "test") == pytest.approx(1.0)
    assert titanic.improvement(base, "test") == 0.0
    assert (titanic.improvement(base - 0.1, "test") or 0.0) < 0
    assert rises("r2")
    assert not rises("RMSE")
    with pytest.raises(ValueError, match="nothing says whether more"):
        rises("sparkle")
    assert titanic.score({"ACCURACY": 0.3}) == 0.3
    assert titanic.score({"Accuracy": float("nan")}) is None
