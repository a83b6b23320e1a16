"""What `turnwise new-env` writes, installed by pip into an environment of its own: it is found, passes its tests, and trains."""

import json
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

import turnwise
from support.rl_command import finish
from support.run_records import metrics

CHECKOUT = Path(__file__).parents[2]
NAMES = ("my_game", "rooms")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a game and an environment with tools."""
    folder = tmp_path_factory.mktemp("new")
    for name, options in zip(NAMES, ([], ["--tools"]), strict=True):
        command = [sys.executable, "-m", "turnwise.cli.turnwise", "new-env", name, *options]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def python(folder: Path) -> str:
    """The Python of a virtual environment where both are installed: it sees what this one has, and nothing is fetched."""
    root = folder / "venv"
    venv.create(root, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(root), "platbase": str(root)}))
    ours = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(Path(turnwise.__file__).parents[1])]
    (packages / "what_is_here_already.pth").write_text("\n".join(dict.fromkeys(ours)))
    found = str(root / "bin" / "python")
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--quiet"]
    editable = [word for name in NAMES for word in ("-e", str(folder / name))]
    subprocess.run([sys.executable, "-m", "pip", "--python", found, "install", *options, *editable], check=True)
    return found


def run(python: str, module: str, *args: str, cwd: Path) -> str:
    done = subprocess.run([python, "-m", module, *args], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_once_installed_they_are_listed(folder: Path, python: str):
    listed = {
        table["id"]: table
        for table in json.loads(run(python, "turnwise.cli.turnwise", "envs", "--json", cwd=folder))["environments"]
    }
    assert [split["size"] > 100 for split in listed["my_game"]["splits"]] == [True, True]
    assert [tool["name"] for tool in listed["rooms"]["tools"]] == ["look_up", "answer"]
    assert listed["rooms"]["problem"] == listed["my_game"]["problem"] == ""


@pytest.mark.parametrize("name", NAMES)
def test_their_own_tests_pass(name: str, folder: Path, python: str):
    assert " passed" in run(python, "pytest", "-q", "-p", "no:cacheprovider", cwd=folder / name)


def test_they_are_typed_as_strictly_as_turnwise(folder: Path):
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["basedpyright"]
    del settings["venv"], settings["venvPath"]
    settings["include"] = [f"{name}/{part}" for name in NAMES for part in ("src", "tests")]
    settings["extraPaths"] = [f"{name}/src" for name in NAMES]
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    run(sys.executable, "basedpyright", "-p", "pyrightconfig.json", "--pythonpath", sys.executable, cwd=folder)


def test_the_configuration_with_tools_is_one_that_can_run(folder: Path, python: str, tiny_model: Path):
    plan = run(python, "turnwise.cli.rl", "@", "rooms/configs/cpu.toml", "--model.name", str(tiny_model), "--dry-run", cwd=folder)
    assert "steps an epoch = floor(200 x 8 / 32) = 50" in plan
    assert not (folder / "outputs").exists()


def test_the_configuration_of_the_game_trains_at_once(folder: Path, python: str, tiny_model: Path):
    smaller = {
        "model.name": tiny_model,
        "max-steps": 2,
        "seq-len": 512,  # the tiny model reads bytes
        "orchestrator.batch-size": 8,
        "orchestrator.rollouts-per-example": 4,
        "orchestrator.eval.num-examples": 2,
        "inference.embedded.deterministic": "true",
        "inference.embedded.threads": 1,
        "trainer.threads": 1,
    }
    flags = [word for key, value in smaller.items() for word in (f"--{key}", str(value))]
    output = finish(folder, "@", "my_game/configs/cpu.toml", *flags, python=python)
    assert "Done at step 2 of 2" in output
    found = metrics(folder / "outputs" / "my_game")
    assert {step for step, values in found.items() if "val-core/my_game/reward/mean" in values} == {0, 2}
    assert all("actor/grad_norm" in found[step] for step in (1, 2))
