"""Which API of verifiers is taken, and which rows are whose."""

import importlib.metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.adapters.verifiers import backend
from turnwise.adapters.verifiers.loop import LoopThread, run_once
from turnwise.adapters.verifiers.rows import Rows, held_out, no_split, place
from turnwise.envs import make


@pytest.mark.parametrize(
    ("installed", "module"),
    [("0.3.1", "classic"), ("0.3.9", "classic"), ("0.4.0", "tasksets"), ("0.4.2rc1", "tasksets"), ("0.4", "tasksets")],
)
def test_the_installed_version_chooses_the_module(monkeypatch: pytest.MonkeyPatch, installed: str, module: str):
    monkeypatch.setattr(backend, "version", lambda name: installed)
    assert backend.backend_target().startswith(f"turnwise.adapters.verifiers.{module}:")


@pytest.mark.parametrize("installed", ["0.2.9", "0.3.0", "0.5.0", "1.4.0", "0.0.0+unknown"])
def test_a_version_of_no_known_api_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch, installed: str):
    monkeypatch.setattr(backend, "version", lambda name: installed)
    with pytest.raises(ValueError, match=r"not known here.*turnwise\[verifiers\].*turnwise\[verifiers-legacy\]"):
        backend.backend_target()


def test_without_the_package_both_extras_are_named(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(backend, "version", missing)
    with pytest.raises(ValueError, match=r"need the package: .*turnwise\[verifiers\].*turnwise\[verifiers-legacy\]"):
        make("verifiers:anything", {"some": "argument"})


@given(size=st.integers(2, 300), data=st.data())
def test_held_out_tasks_are_never_trained_on_and_none_is_lost(size: int, data: st.DataObject):
    count = data.draw(st.integers(1, size - 1))
    splits = held_out(size, count, name="theirs")
    assert len(splits["validation"]) == count
    assert sorted([*splits["train"], *splits["validation"]]) == list(range(size))


@pytest.mark.parametrize("count", [0, 4, -1, True, "2", {"first": 7}])
def test_a_count_that_leaves_nothing_to_train_on_is_refused(count: object):
    with pytest.raises(ValueError, match=r"args\.adapter\.validation"):
        held_out(4, count, name="theirs")


@given(start=st.integers(0, 50), size=st.integers(1, 50), data=st.data())
def test_a_row_says_its_table_and_position(start: int, size: int, data: st.DataObject):
    rows = Rows("train", range(start, start + size))
    index = data.draw(st.integers(-size, size - 1))
    assert place(rows[index], name="theirs") == ("train", range(start, start + size)[index])
    assert [row["id"] for row in rows[1:3]] == [row["id"] for row in list(rows)[1:3]]


@pytest.mark.parametrize("row", [{}, {"id": "train"}, {"id": "train/-1"}, {"id": "test/1"}])
def test_a_row_of_somebody_else_is_refused(row: dict[str, str]):
    with pytest.raises(ValueError, match="none of its rows"):
        place(row, name="theirs")


def test_an_unknown_split_is_told_from_an_empty_one():
    assert "not 'test'" in str(no_split("theirs", "test", "no eval set"))
    assert str(no_split("theirs", "validation", "no eval set")) == "theirs has no validation tasks: no eval set"


def test_a_loop_of_its_own_runs_a_coroutine_from_within_another_and_hands_on_what_it_raises():
    async def fails() -> None:
        raise KeyError("inside")

    async def outer() -> None:
        run_once(fails(), "inner", timeout_s=5)

    with pytest.raises(KeyError, match="inside"):
        run_once(outer(), "outer", timeout_s=5)


def test_a_loop_that_ticks_is_not_stuck():
    thread = LoopThread("some")
    assert not thread.stuck
    thread._beat -= 1000.0
    assert thread.stuck
    thread.stop()
