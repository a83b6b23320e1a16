"""Reading task rows."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.envs.tasks import SplitSpec, check_rows, data_folder, read_hub, read_jsonl, select


@given(size=st.integers(0, 40), start=st.none() | st.integers(-50, 50), stop=st.none() | st.integers(-50, 50))
@settings(deadline=None)
def test_a_slice_means_what_it_means_to_a_list(size: int, start: int | None, stop: int | None) -> None:
    text = f"train[{'' if start is None else start}:{'' if stop is None else stop}]"
    assert list(SplitSpec.parse(text).indices(size)) == list(range(size))[start:stop]


def test_splits_are_written_as_on_the_hub() -> None:
    assert SplitSpec.parse("train") == SplitSpec("train")
    assert list(SplitSpec.parse("test[25%:50%]").indices(8)) == [2, 3]
    assert SplitSpec.parse(" train [:3]").name == "train"
    for text in ("", "train[3]", "train[:3", "[:3]", "train[a:b]"):
        with pytest.raises(ValueError, match="is not of the form"):
            SplitSpec.parse(text)


def test_every_row_keeps_its_id_in_every_slice() -> None:
    rows = [{"n": n} for n in range(10)]
    assert select(rows, SplitSpec.parse("train[4:6]"), prefix="data") == (
        {"n": 4, "id": "data/train/4"},
        {"n": 5, "id": "data/train/5"},
    )
    assert select([{"id": 7}], SplitSpec("train"), prefix="data") == ({"id": "7"},)
    with pytest.raises(ValueError, match=r"two tasks of data/train have the id '7'"):
        select([{"id": 7}, {"id": "7"}], SplitSpec("train"), prefix="data")


def test_a_jsonl_file_is_read_past_empty_lines_and_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x\\u2028y"}\n\n{"a": 2}\r\n', encoding="utf-8")
    assert read_jsonl(path) == [{"a": "x\u2028y"}, {"a": 2}]
    read_jsonl(path)[0]["a"] = "changed by a caller"
    assert read_jsonl(path)[0]["a"] == "x\u2028y"
    path.write_text('{"a": 3}\n')
    assert read_jsonl(path) == [{"a": 3}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"q": 1}\n{"q": 2\n', r"rows\.jsonl:2: not JSON: Expecting ',' delimiter at column 8"),
        ('{"q": 1}\n\n[1, 2]\n', r"rows\.jsonl:3: a task must be a JSON object, not list"),
        ('{"q": 1}\n{"question": 2, "r": 1}\n', r"rows\.jsonl:2: the field 'q' is missing; there are question, r"),
        ("\n", r"rows\.jsonl holds no row"),
        ("\xff", r"task file .*rows\.jsonl cannot be read"),
    ],
)
def test_a_broken_line_is_named_with_file_and_number(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_jsonl(path, required=("q",))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl cannot be read: .*No such file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_rows_of_a_list_are_checked_and_copied() -> None:
    rows = [{"q": 1}]
    assert check_rows(rows, required=("q",), source="args.train") == rows
    assert check_rows(rows, required=("q",), source="args.train")[0] is not rows[0]
    with pytest.raises(ValueError, match=r"args\.train\[1\]: the field 'q' is missing; there are none"):
        check_rows([{"q": 1}, {}], required=("q",), source="args.train")


def test_the_data_folder_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TURNWISE_DATA", raising=False)
    assert data_folder() is None
    monkeypatch.setenv("TURNWISE_DATA", str(tmp_path))
    assert data_folder() == tmp_path
    monkeypatch.setenv("TURNWISE_DATA", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"TURNWISE_DATA = .*none' is not a folder; correct it or unset it"):
        data_folder()


def test_a_hub_data_set_is_read_by_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder takes the same way through `datasets` as a hub id."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "their_data"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"q": n}) + "\n" for n in range(5)))
    rows = read_hub(str(folder), SplitSpec.parse("train[3:]"), required=("q",))
    assert rows == [{"id": f"{folder}/train/3", "q": 3}, {"id": f"{folder}/train/4", "q": 4}]


def test_a_hub_out_of_reach_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'nobody/nothing', split 'train', cannot be loaded from the hub .*TURNWISE_DATA"):
        read_hub("nobody/nothing,main", SplitSpec("train"))
