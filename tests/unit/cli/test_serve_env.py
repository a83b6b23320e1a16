"""`turnwise serve-env`: what it refuses and warns of. That it serves is shown with the real package."""

import importlib.util
from typing import Any

import pytest

from turnwise.cli import serve_env
from turnwise.cli.turnwise import run_command


@pytest.mark.skipif(importlib.util.find_spec("openenv") is not None, reason="openenv is installed")
def test_a_missing_package_names_the_extra(capsys: pytest.CaptureFixture[str]):
    assert run_command(["serve-env", "wordle"]) == 2
    assert "pip install 'turnwise[openenv]'" in capsys.readouterr().err


def test_an_unknown_environment_is_named(capsys: pytest.CaptureFixture[str]):
    assert run_command(["serve-env", "wordel"]) == 2
    assert "unknown environment 'wordel'" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--max-sessions", "0"], ["--session-timeout", "0"]])
def test_bounds_that_are_none_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]):
    assert run_command(["serve-env", "wordle", *wrong]) == 2
    assert "must be above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "warned"), [("127.0.0.1", False), ("localhost", False), ("::1", False), ("0.0.0.0", True), ("10.0.0.5", True)]
)
def test_an_address_that_others_reach_is_warned_of(
    host: str, warned: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    served: list[Any] = []

    def make_app(make_env: Any, _options: Any) -> Any:
        return make_env()

    monkeypatch.setattr(serve_env, "_app", make_app)
    monkeypatch.setattr(serve_env, "_serve", lambda app, options: served.append((app.max_turns, options.port)))
    assert run_command(["serve-env", "wordle", "--host", host, "--port", "8123", "--max_turns", "4"]) == 0
    assert served == [(4, 8123)]
    assert ("asks for no password" in capsys.readouterr().err) == warned
