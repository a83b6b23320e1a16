"""`turnwise new-env`: what it writes, prints and refuses."""

import keyword
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.cli.turnwise import run_command
from turnwise.config import ConfigError
from turnwise.envs import registry
from turnwise.scaffold import Kind, files_of, write_package
from turnwise.scaffold.names import MAX_CHARACTERS, check_name, class_name

CHECKOUT = Path(__file__).parents[3]
FILES = {
    *("pyproject.toml", "README.md", "configs/cpu.toml", "tests/test_env.py"),
    *("src/my_game/__init__.py", "src/my_game/env.py"),
}


def files_under(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("tools", [False, True])
def test_the_command_writes_the_package_and_prints_the_next_commands(
    tools: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert run_command(["new-env", "my_game", *(["--tools"] if tools else [])]) == 0
    printed = capsys.readouterr().out.splitlines()
    written = files_under(tmp_path / "my_game")
    assert set(written) == FILES
    assert set(printed[:6]) == {f"my_game/{file}" for file in FILES}
    assert [line.strip() for line in printed if line.startswith("    ")] == [
        "pip install -e my_game",
        "turnwise envs my_game",
        "turnwise play my_game",
        "pytest my_game",
        "rl @ my_game/configs/cpu.toml",
    ]
    project = tomllib.loads(written["pyproject.toml"])["project"]
    assert project["entry-points"] == {"turnwise.envs": {"my_game": "my_game:MyGame"}}
    (table,) = tomllib.loads(written["configs/cpu.toml"])["orchestrator"]["env"]
    assert table["id"] == "my_game"
    assert ("(ToolEnv)" if tools else "(TextEnv)") in written["src/my_game/env.py"]


def test_the_folder_can_be_chosen_and_is_quoted_in_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run_command(["new-env", "my_game", "--folder", str(tmp_path / "deep" / "my games")]) == 0
    assert set(files_under(tmp_path / "deep" / "my games")) == FILES
    assert f"pip install -e '{tmp_path}/deep/my games'" in capsys.readouterr().out


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch])
def test_what_exists_is_never_touched(make: object, tmp_path: Path):
    folder = tmp_path / "taken"
    make(folder)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"taken exists; nothing is overwritten\. Choose another with --folder"):
        write_package("my_game", folder, Kind.GAME)
    assert list(folder.rglob("*")) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("class", "is a keyword of Python"),
        ("wordle", "it stands for turnwise.envs.wordle:Wordle"),
        ("scheme", "ids scheme:NAME are those of an adapter"),
        ("json", "Python imports"),
        ("sys", "Python imports built-in by it"),
        ("turnwise", "Python imports"),
        ("My-Game", "beginning with a letter; my_game would do."),
        ("2048", "beginning with a letter."),
        ("a__b", "a_b would do"),
        ("../up", "up would do"),
        ("", "beginning with a letter."),
        ("x" * (MAX_CHARACTERS + 1), "at most 40"),
        ("Wordle", "beginning with a letter."),  # and no hint at a name that is taken
    ],
)
def test_names_that_cannot_be_used_are_refused_before_anything_is_written(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(registry.ADAPTERS, "scheme", "nowhere:Nothing")
    assert run_command(["new-env", name, "--folder", str(tmp_path / "new")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_no_package_does_not_take_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_game").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    check_name("my_game")


@given(st.from_regex(r"[a-z][a-z0-9_]{0,39}", fullmatch=True))
def test_every_name_that_is_accepted_makes_a_class_of_its_own(name: str):
    try:
        check_name(name)
    except ConfigError:
        return
    made = class_name(name)
    assert made.isidentifier()
    assert not keyword.iskeyword(made)
    assert made not in {"TextEnv", "ToolEnv", "Task", "Step", "Sequence", "ValueError", "True", "None"}


@pytest.mark.parametrize(("name", "expected"), [("task", "TaskGame"), ("none", "NoneGame"), ("exception", "ExceptionGame")])
def test_a_class_does_not_hide_what_its_module_uses(name: str, expected: str):
    assert class_name(name) == expected


def test_packages_keep_to_our_rules_and_format_whatever_their_name(tmp_path: Path):
    rules = ("E", "F", "I", "UP", "B", "SIM", "RUF", "C4", "PT")
    ours = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert set(rules) == {*ours["lint"]["select"]} - {"ASYNC"}  # there is nothing asynchronous in an environment
    for name in ("ab", "zoo", "x" * MAX_CHARACTERS, "task"):
        for kind in Kind:
            folder = tmp_path / f"{name}-{kind}"
            write_package(name, folder, kind)
            project = tomllib.loads((folder / "pyproject.toml").read_text())
            assert project["tool"]["ruff"] == {"line-length": ours["line-length"], "lint": {"select": [*rules]}}
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", "."], cwd=tmp_path, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_no_template_leaves_a_mark_of_its_language():
    for kind in Kind:
        for path, text in files_of("my_game", kind).items():
            assert text.endswith("\n"), path
            assert not text.endswith("\n\n"), path
            assert "{%" not in text, path
            assert "{{ " not in text, path
