"""`turnwise check` from its command line, with an engine without a model."""

import json
from pathlib import Path

import pytest
import tomli_w

from support.planted_checks import FLAT, ScriptedContext, tables
from turnwise.cli.turnwise import run_command
from turnwise.config import ConfigError, RLConfig
from turnwise.diagnose import command
from turnwise.diagnose.command import CheckOptions, check_command
from turnwise.diagnose.context import Context
from turnwise.launch.models import Progress

ONLY = ("advantages", "mask")
RUN = ["plan", "template", "environment", "rollouts", "reward", "advantages", "mask"]


def scripted(config: RLConfig, scratch: Path, say: Progress, rollouts: int | None) -> Context:
    return ScriptedContext(config, scratch, rollouts=rollouts or 12)


@pytest.fixture
def file(tiny_model: Path, tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(tables(tiny_model, tmp_path)))
    return str(path)


def test_results_are_told_line_by_line_and_the_code_is_zero(file: str, capsys: pytest.CaptureFixture[str]):
    assert check_command(["@", file], CheckOptions(ONLY), scripted) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line[:4] in ("pass", "WARN")] == RUN
    assert lines[-1].endswith(" s.")


def test_a_failure_is_named_and_the_code_is_one(file: str, capsys: pytest.CaptureFixture[str]):
    env = json.dumps([{"id": FLAT}])
    assert check_command(["@", file, "--orchestrator.env", env], CheckOptions(ONLY), scripted) == 1
    out = capsys.readouterr().out
    assert "FAIL    reward" in out
    assert "blocked advantages" in out
    assert out.splitlines()[-1].endswith("The fault is named by the first to fail: reward.")


def test_json_goes_to_stdout_alone_when_it_is_asked_for_there(file: str, capsys: pytest.CaptureFixture[str]):
    assert check_command(["@", file], CheckOptions(ONLY, json="-"), scripted) == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert [check["name"] for check in content["checks"]] == RUN
    assert "pass    plan" in captured.err


def test_a_folder_gets_page_and_json(file: str, tmp_path: Path):
    output, copy = tmp_path / "page", tmp_path / "copy.json"
    assert check_command(["@", file], CheckOptions(("plan",), json=str(copy), output=output), scripted) == 0
    assert (output / "check.json").read_bytes() == copy.read_bytes()
    assert "| plan |" in (output / "check.md").read_text()


def test_the_folder_of_the_run_is_not_touched(file: str, tmp_path: Path):
    check_command(["@", file], CheckOptions(ONLY), scripted)
    assert not (tmp_path / "run").exists()


def test_rollouts_are_played_as_many_as_were_asked_for(file: str, capsys: pytest.CaptureFixture[str]):
    check_command(["@", file], CheckOptions(("rollouts",), rollouts=20, json="-"), scripted)
    assert json.loads(capsys.readouterr().out)["checks"][-1]["data"]["rollouts"] == 20


@pytest.mark.parametrize(
    ("options", "args", "told"),
    [
        (CheckOptions(("rewrad",)), [], r"there is no check 'rewrad'\. Did you mean 'reward'"),
        (CheckOptions(rollouts=0), [], "--rollouts 0: at least one"),
        (CheckOptions(), ["--orchestrator.batch-size", "7"], "batch_size = 7"),
        (CheckOptions(), ["--no-such-key", "7"], "no_such_key"),
    ],
)
def test_a_wrong_command_line_starts_nothing(file: str, options: CheckOptions, args: list[str], told: str):
    with pytest.raises(ConfigError, match=told):
        check_command(["@", file, *args], options, scripted)


def test_the_parser_hands_options_on_and_flags_to_the_configuration(file: str, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[list[str], CheckOptions]] = []

    def record(args: list[str], options: CheckOptions) -> int:
        seen.append((list(args), options))
        return 1

    monkeypatch.setattr(command, "check_command", record)
    line = ["check", "@", file, "--only", "plan,mask", "--rollouts", "9", "--json", "-", "--output", "page", "--output-dir", "x"]
    assert run_command(line) == 1
    assert seen == [(["@", file, "--output-dir", "x"], CheckOptions(("plan", "mask"), 9, "-", Path("page")))]


def test_a_wrong_configuration_is_told_with_code_two(file: str, capsys: pytest.CaptureFixture[str]):
    assert run_command(["check", "@", file, "--orchestrator.batch-size", "7"]) == 2
    assert "turnwise check: One problem in the configuration" in capsys.readouterr().err


def test_an_interrupt_ends_what_was_started(file: str, capsys: pytest.CaptureFixture[str]):
    closed: list[bool] = []

    class Interrupted(ScriptedContext):
        def open_engines(self):
            raise KeyboardInterrupt

        def close(self) -> None:
            closed.append(True)
            super().close()

    def make(config: RLConfig, scratch: Path, say: Progress, rollouts: int | None) -> Context:
        return Interrupted(config, scratch)

    with pytest.raises(KeyboardInterrupt):
        check_command(["@", file], CheckOptions(ONLY), make)
    assert closed == [True]
