"""MuSiQue's rows: specs, files, filters."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.musique_rows import bridge_row, river_row, unanswerable_row
from turnwise.envs.musique.corpora import shared_corpus
from turnwise.envs.musique.data import Question, hop_count, keep, local_file, only_answerable, paragraph_rows, read_rows
from turnwise.envs.musique.retrieval import Paragraph
from turnwise.envs.tasks import TableSpec

SPEC = "bdsaglam/musique,answerable,train"
Write = Callable[[str, Sequence[Mapping[str, Any]]], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes rows to a file of `musique/` in a data folder; TURNWISE_DATA names the folder."""
    (tmp_path / "musique").mkdir()
    monkeypatch.setenv("TURNWISE_DATA", str(tmp_path))

    def rows(name: str, content: Sequence[Mapping[str, Any]]) -> Path:
        path = tmp_path / "musique" / name
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return path

    return rows


def many(count: int) -> list[dict[str, Any]]:
    return [bridge_row(id=f"2hop__{number}_0") for number in range(count)]


def ids(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [row["id"] for row in rows]


def test_a_row_becomes_a_question() -> None:
    question = Question.of(bridge_row())
    assert question.text == "In which country was the architect of Tolvar Bridge born?"
    assert question.truths == ("The Kingdom of Norway", "Norway")
    assert question.answerable
    assert question.supporting == {1, 3}
    assert question.paragraphs[2] == Paragraph("Olm", "The Olm is a river with seven bridges.")
    assert not Question.of(unanswerable_row()).answerable


def test_paragraphs_may_come_as_a_table_of_columns() -> None:
    rows = bridge_row()["paragraphs"]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    assert paragraph_rows(columns) == rows
    assert Question.of(bridge_row(paragraphs=columns)) == Question.of(bridge_row())


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": "x", "question": "?", "answer": "!"}, r"MuSiQue task 'x' lacks the field 'paragraphs'"),
        (bridge_row(paragraphs=[{"title": "x"}]), r"needs 'title' and 'paragraph_text' \(KeyError\('paragraph_text'\)\)"),
        (bridge_row(paragraphs=["text"]), r"every paragraph needs 'title' and 'paragraph_text'"),
    ],
)  # fmt: skip
def test_a_broken_row_is_named(row: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Question.of(row)


def test_a_known_hub_id_is_read_from_the_data_folder_in_slices(write: Write) -> None:
    write("musique_ans_train.jsonl", many(5))
    assert ids(read_rows(f"{SPEC}[:2]", key="args.train")) == ["2hop__0_0", "2hop__1_0"]
    assert ids(read_rows(f"{SPEC}[3:]", key="args.train")) == ["2hop__3_0", "2hop__4_0"]
    assert read_rows(SPEC, key="args.train") is read_rows(SPEC, key="args.train")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (SPEC, "musique_ans_v1.0_train.jsonl"),
        (SPEC, "musique_ans_train_with_paragraphs.jsonl"),
        (SPEC, "musique_answerable_train.jsonl"),
        ("bdsaglam/musique,full,validation", "musique_full_v1.0_dev.jsonl"),
        ("bdsaglam/musique-mini,answerable,validation[:3]", "musique-mini_answerable_validation.jsonl"),
    ],
)
def test_official_and_plain_names_of_local_files_are_known(write: Write, spec: str, name: str) -> None:
    assert local_file(TableSpec.parse(spec)) is None
    path = write(name, many(1))
    assert local_file(TableSpec.parse(spec)) == path


def test_several_specs_are_joined_and_common_rows_come_once(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write("some.jsonl", many(4))
    for source in (f"{path}[:2] + {path}[1:3]", [f"{path}[:2]", f"{path}[1:3]"]):
        assert ids(read_rows(source, key="args.train")) == ["2hop__0_0", "2hop__1_0", "2hop__2_0"]
    assert "args.train: 1 rows come more than once and are taken once" in caplog.text


def test_a_relative_path_is_looked_for_in_the_data_folder(write: Write) -> None:
    write("some.jsonl", many(4))
    train = read_rows("musique/some.jsonl[:3]", key="args.train")
    assert ids([*train, *read_rows("musique/some.jsonl[3:]", key="args.validation")]) == ids(many(4))


def test_a_file_that_changes_is_read_again(write: Write) -> None:
    path = write("some.jsonl", many(1))
    assert len(read_rows(str(path), key="args.train")) == 1
    write("some.jsonl", many(3))
    assert len(read_rows(str(path), key="args.train")) == 3


def test_fewer_rows_than_asked_for_are_told(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    path = write("some.jsonl", many(3))
    with caplog.at_level(logging.WARNING):
        read_rows(f"{path}[:3]", key="args.train")
        assert caplog.text == ""
        read_rows(f"{path}[:256]", key="args.train")
    assert "some.jsonl[:256]': there are only 3 rows" in caplog.text


def test_a_split_that_is_not_there_says_what_is_and_what_to_do(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ValueError("the hub cannot be reached")

    monkeypatch.setattr("turnwise.envs.musique.data.read_hub", unreachable)
    write("musique_ans_train_with_paragraphs.jsonl", many(3))
    with pytest.raises(ValueError, match=r"has no split 'validation'") as refused:
        read_rows("bdsaglam/musique,answerable,validation", key="args.validation")
    for words in (
        "args.validation = 'bdsaglam/musique,answerable,validation'",
        "there is musique_ans_train_with_paragraphs.jsonl",
        "the hub cannot be reached",
        'train = "musique/FILE.jsonl[:80]" and validation = "musique/FILE.jsonl[80:]"',
    ):
        assert words in str(refused.value)
    with pytest.raises(ValueError, match=r"args\.train = 'someone/else,train': the hub cannot be reached"):
        read_rows("someone/else,train", key="args.train")


def test_rows_of_a_list_get_ids_and_are_checked() -> None:
    row = bridge_row()
    del row["id"]
    assert ids(read_rows([row, bridge_row()], key="args.train")) == ["musique/args.train/0", "2hop__1_3"]
    with pytest.raises(ValueError, match=r"args\.train\[1\]: the field 'answer' is missing"):
        read_rows([row, {"question": "?"}], key="args.train")
    with pytest.raises(ValueError, match=r"args\.train mixes texts and rows"):
        read_rows([SPEC, row], key="args.train")  # type: ignore[list-item]


def test_an_unanswerable_variant_has_an_id_of_its_own() -> None:
    assert ids(read_rows([bridge_row(), unanswerable_row()], key="args.train")) == ["2hop__1_3", "2hop__1_3/unanswerable"]


def test_filters_keep_hops_and_answerability() -> None:
    rows = [bridge_row(), river_row(), unanswerable_row()]
    assert [hop_count(row) for row in rows] == [2, 3, 2]
    assert hop_count(bridge_row(id="mine")) == 2
    assert hop_count(river_row(id="mine")) == 3
    assert len(keep(rows, hops=None, answerable=None)) == 3
    assert ids(keep(rows, hops=[3, 4], answerable=None)) == ["3hop1__5_6_7"]
    assert [row["answerable"] for row in keep(rows, hops=[2], answerable=False)] == [False]


@pytest.mark.parametrize(
    ("source", "sure"),
    [
        (SPEC, True),
        (f"{SPEC} + bdsaglam/musique,full,train", False),
        ([SPEC, SPEC], True),
        ("rows.jsonl", False),
        ([bridge_row()], False),
    ],
)
def test_only_the_answerable_configuration_promises_answers(source: Any, sure: bool) -> None:
    assert only_answerable(source) is sure


def test_all_paragraphs_of_all_rows_make_one_corpus(write: Write) -> None:
    path = write("some.jsonl", [bridge_row()])
    sources = {"train": str(path), "validation": [river_row()]}
    corpus = shared_corpus("all", sources)
    assert corpus.titles == ["Harbour Post", "Tolvar Bridge", "Olm", "Ilse Marn", "Norway", "Sael", "Tarn"]
    assert shared_corpus("all", {**sources}) is corpus
    write("some.jsonl", [river_row()])
    assert shared_corpus("all", sources).titles == ["Olm", "Sael", "Tarn"]


def test_a_file_of_paragraphs_or_of_rows_makes_a_corpus(write: Write) -> None:
    path = write("corpus.jsonl", [{"title": "A", "text": "first"}, {"title": "B", "paragraph_text": "second"}, river_row()])
    assert shared_corpus(str(path), {}).titles == ["A", "B", "Olm", "Sael", "Tarn"]
    assert shared_corpus(f"{path}[1:2]", {}).titles == ["B"]
    with pytest.raises(ValueError, match=r"args\.corpus = 'everything' must be 'question', 'all' or a JSONL file"):
        shared_corpus("everything", {})
    write("corpus.jsonl", [{"heading": "A"}])
    with pytest.raises(ValueError, match=r"args\.corpus = .*corpus\.jsonl': every paragraph needs"):
        shared_corpus(str(path), {})
