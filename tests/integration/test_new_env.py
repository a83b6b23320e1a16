"""`turnwise new-env`, from the first command to a trained policy, as docs/environments.md tells it; and a package with tools."""

import doctest
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

import turnwise
from support.rl_command import finish
from support.run_records import metrics

CHECKOUT = Path(__file__).parents[2]
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TYPED = re.compile(r"^> (.*)$", re.MULTILINE)
SMALLER = {  # than the configuration that is written, for the tiny model
    "max-steps": 2,
    "seq-len": 512,  # it reads bytes
    "orchestrator.batch-size": 8,
    "orchestrator.rollouts-per-example": 4,
    "orchestrator.eval.num-examples": 2,
    "inference.embedded.deterministic": "true",
    "inference.embedded.threads": 1,
    "trainer.threads": 1,
}


@dataclass
class Terminal:
    """Runs what a user would type in a folder, with a virtual environment of its own: it sees what this one has, nothing more."""

    folder: Path
    model: Path
    python: str

    @classmethod
    def open(cls, folder: Path, model: Path) -> "Terminal":
        root = folder / "venv"
        venv.create(root, symlinks=True)
        packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(root), "platbase": str(root)}))
        here = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(turnwise.__file__).parents[1])]
        (packages / "what_is_here_already.pth").write_text("\n".join(dict.fromkeys(here)))
        return cls(folder, model, str(root / "bin" / "python"))

    def type(self, command: str, stdin: str = "") -> str:
        """What a command prints. Fails with its output where its exit code is not 0."""
        program, *args = shlex.split(command)
        model = ["--model.name", str(self.model)]
        if program == "rl":
            smaller = [word for key, value in SMALLER.items() for word in (f"--{key}", str(value))]
            return finish(self.folder, *args, *model, *smaller, python=self.python)
        words = {
            "pip": [sys.executable, "-m", "pip", "--python", self.python, *args, "--no-deps", "--no-build-isolation", "-q"],
            "pytest": [self.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args],
            "turnwise": [self.python, "-m", "turnwise.cli.turnwise", *args],
        }[program]
        if args[0] == "check":
            words += [*model, "--seq-len", "512", "--only", "environment"]
        environ = {**os.environ, "COLUMNS": "80", "PIP_NO_INDEX": "1", "OMP_NUM_THREADS": "1"}
        options = {"cwd": self.folder, "env": environ, "capture_output": True, "text": True}
        done = subprocess.run(words, input=stdin, timeout=300, check=False, **options)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Terminal:
    return Terminal.open(tmp_path_factory.mktemp("new"), tiny_model)


@pytest.fixture(scope="module")
def rooms(terminal: Terminal) -> Path:
    """An installed package with tools."""
    terminal.type("turnwise new-env rooms --tools")
    terminal.type("pip install -e rooms")
    return terminal.folder / "rooms"


def test_the_session_of_the_guide_goes_as_it_is_printed(terminal: Terminal):
    text = "".join(CONSOLE.findall((CHECKOUT / "docs" / "environments.md").read_text(encoding="utf-8")))
    session = [part.partition("\n") for part in re.split(r"^\$ ", text, flags=re.MULTILINE) if part]
    assert [command.split()[0] for command, _, _ in session] == ["turnwise", "pip", *["turnwise"] * 2, "pytest", "turnwise", "rl"]
    for command, _, expected in session:
        said = terminal.type(command, "\n".join([*TYPED.findall(expected), ""]))
        assert doctest.OutputChecker().check_output(expected, said, doctest.ELLIPSIS), f"$ {command}\n{said}"
    found = metrics(terminal.folder / "outputs" / "my_game")
    assert {step for step, values in found.items() if "val-core/my_game/reward/mean" in values} == {0, 2}
    assert all("actor/grad_norm" in found[step] for step in (1, 2))


def test_a_package_with_tools_is_found_and_passes_its_tests(terminal: Terminal, rooms: Path):
    told = json.loads(terminal.type("turnwise envs rooms --json"))
    assert (told["target"], told["problem"]) == ("rooms:Rooms", "")
    assert [tool["name"] for tool in told["tools"]] == ["look_up", "answer"]
    assert " passed" in terminal.type("pytest rooms")


def test_the_configuration_of_a_package_with_tools_is_one_that_can_run(terminal: Terminal, rooms: Path):
    config = tomllib.loads((rooms / "configs" / "cpu.toml").read_text())
    plan = terminal.type("rl @ rooms/configs/cpu.toml --dry-run")
    assert "steps an epoch = floor(200 x 4 / 8) = 100" in plan
    assert not (terminal.folder / config["output_dir"]).exists()


def test_what_is_written_is_typed_as_strictly_as_turnwise(terminal: Terminal, rooms: Path):
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["basedpyright"]
    del settings["venv"], settings["venvPath"]
    terminal.type("turnwise new-env number_game")
    names = ("rooms", "number_game")
    settings["include"] = [f"{name}/{part}" for name in names for part in ("src", "tests")]
    settings["extraPaths"] = [f"{name}/src" for name in names]
    (terminal.folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "-p", "pyrightconfig.json", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=terminal.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
