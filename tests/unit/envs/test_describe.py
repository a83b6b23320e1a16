"""What is said of environments of others: of their arguments, tasks and failures, and that none of them stops the rest."""

import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import gymnasium
import pytest

from turnwise.envs import Step, Task, TextEnv, register, registered, registry
from turnwise.envs.describe import Argument, Split, describe

HELD = threading.Event()


class Slow(TextEnv):
    """Counts its tasks for ever.

    Args:
        lists: the words,
            one a line
    """

    component_names = frozenset({"win", "hint"})
    max_turns = 3
    closed = 0

    def __init__(self, lists: Sequence[str] | Path, depth: "int | None" = None, *, more=1, **rest: object) -> None:  # type: ignore[no-untyped-def]
        super().__init__()

    def tasks(self, split: str) -> Sequence[Task]:
        if split == "train":
            HELD.wait()
        raise KeyError(split)

    def begin(self, task: Task) -> str:
        return ""

    def step(self, action: str) -> Step:
        return self.win("")

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(sys.modules, "slow_env", sys.modules[__name__])
    HELD.clear()
    yield "slow_env:Slow"
    HELD.set()


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registries that forget afterwards what a test registers."""
    monkeypatch.setattr(registry, "_REGISTRATIONS", dict(registry._REGISTRATIONS))
    before = set(gymnasium.registry)
    yield
    for name in set(gymnasium.registry) - before:
        del gymnasium.registry[name]


def test_arguments_are_told_with_annotation_default_and_docstring(slow: str):
    found = describe(slow)
    assert found.arguments == (
        Argument("lists", "Sequence[str] | Path", True, None, "the words, one a line"),
        Argument("depth", "int | None", False, None, ""),
        Argument("more", "", False, 1, ""),
    )
    assert found.text == "Counts its tasks for ever."
    assert (found.components, found.outcome_components) == (("hint", "win"), ("win",))


def test_what_is_missing_to_make_it_is_told(slow: str):
    assert "missing 1 required positional argument: 'lists'" in describe(slow).problem


def test_tasks_that_cannot_be_counted_stop_nothing(slow: str):
    before = Slow.closed
    found = describe(slow, {"lists": []}, timeout_s=0.01)
    assert found.splits == (
        Split("train", None, "its tasks are not read within 0.01 s"),
        Split("validation", None, "KeyError: 'validation'"),
    )
    assert (found.problem, found.max_turns) == ("", 3)
    assert Slow.closed == before + 1


@pytest.mark.parametrize(
    ("code", "problem"), [("1 / 0", "ZeroDivisionError"), ("(", "SyntaxError"), ("import no_such", "no_such")]
)
def test_a_module_that_cannot_be_imported_is_told_of_and_stops_nobody_else(
    code: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetful: None
):
    (tmp_path / "broken_env.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    register("broken", "broken_env:Env")
    assert problem in describe("broken").problem
    assert registered()["broken"].startswith("(unusable: ")
    assert registered()["wordle"].startswith("Find a hidden")


def test_defaults_of_a_registration_are_the_defaults(forgetful: None):
    register("short", "turnwise.envs.wordle:Wordle", description="Three guesses.", max_turns=3)
    found = describe("short")
    assert (found.text, found.max_turns) == ("Three guesses.", 3)
    assert {argument.name: argument.default for argument in found.arguments}["max_turns"] == 3


def test_an_unknown_name_is_refused_with_a_near_one():
    with pytest.raises(ValueError, match="Did you mean 'wordle'"):
        describe("wordel")
