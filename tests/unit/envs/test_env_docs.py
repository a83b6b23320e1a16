"""The pages on environments: their examples run and print what they say; what they say of MuSiQue is so."""

import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from turnwise.config import load_config
from turnwise.envs import make
from turnwise.envs.musique import MuSiQue
from turnwise.envs.registry import ENTRY_POINT_GROUP

DOCS = Path(__file__).parents[3] / "docs"
PAGE = DOCS / "environments.md"
BLOCK = re.compile(r"^```(?P<kind>.*)\n(?P<text>(?:(?!```).*\n)*)```$", re.MULTILINE)
SAID = re.compile(r"^print\(.*\)  # (.*)$", re.MULTILINE)  # what a line prints stands behind it
RUN_ALL = """
import contextlib, io, json, runpy, sys
printed = {}
for name in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(name, run_name="__main__")
    printed[name] = output.getvalue().splitlines()
print(json.dumps(printed))
"""


def blocks(kind: str, page: Path = PAGE) -> list[str]:
    return [match["text"] for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if match["kind"] == kind]


def python_files() -> dict[str, str]:
    found = [match for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8")) if match["kind"].startswith("python")]
    return {match["kind"].removeprefix("python file="): match["text"] for match in found}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the Python of the page."""
    for name, code in python_files().items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    return tmp_path


def run(folder: Path, code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code, *args], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_block_of_the_page_is_of_a_kind_that_a_test_runs() -> None:
    """Those of the kind `console` are run by tests/integration/test_new_env.py."""
    text = PAGE.read_text(encoding="utf-8")
    kinds = [match["kind"] for match in BLOCK.finditer(text)]
    assert len(kinds) == text.count("```") / 2
    assert {kind for kind in kinds if not re.fullmatch(r"python file=\w+\.py", kind)} == {"toml", "console"}


def test_the_python_of_the_page_runs_and_prints_what_stands_behind_it(folder: Path) -> None:
    files = python_files()
    assert list(files) == ["guess_number.py", "check.py", "unfinished.py", "almanac.py", "look_up.py"]
    printed = json.loads(run(folder, RUN_ALL, *files))
    assert printed == {name: SAID.findall(code) for name, code in files.items()}
    assert sum(map(len, printed.values())) == 5


def test_the_environments_of_the_page_are_what_it_says_of_them(folder: Path) -> None:
    code = (
        "import io, gymnasium, guess_number\n"
        "from gymnasium.utils.env_checker import check_env\n"
        "from turnwise.envs import make\n"
        "from turnwise.envs.play import play\n"
        "assert gymnasium.make('turnwise/guess_number').unwrapped.largest == 100\n"
        "task = {'id': 'x', 'target': 7}\n"
        "env = make('almanac:Almanac')\n"
        "check_env(env)\n"
        "print([tool.name for tool in env.tools], env.tools[0].parameters['properties']['lines'])\n"
        "lines = 'look_up Narnia\\nlook_up(country=\"Peru\")\\nanswer Lima\\n'\n"
        "print(play(env, input=io.StringIO(lines), output=io.StringIO(), task={'id': 'x', 'country': 'Peru'}))\n"
        "env = make('guess_number:GuessNumber')\n"
        "print(play(env, input=io.StringIO('9\\nx\\n7\\n'), output=io.StringIO(), task=task))\n"
        "env.reset(options={'task': task})\n"
        "print(env.step('9' * 5000)[0])\n"
    )
    lines = "{'type': 'integer', 'description': 'how many lines to show', 'default': 1}"
    # 0.98 nearer than at the start, a reply that is no number, the win
    assert run(folder, code).splitlines() == [f"['look_up', 'answer'] {lines}", "1.1", "1.88", "Reply with one number."]


def test_the_configurations_of_the_page_are_valid(tmp_path: Path) -> None:
    tables = [tomllib.loads(text) for text in blocks("toml")]
    (project,) = (table["project"] for table in tables if "project" in table)
    assert project == {"entry-points": {ENTRY_POINT_GROUP: {"guess_number": "guess_number:GuessNumber"}}}
    runs = [text for text, table in zip(blocks("toml"), tables, strict=True) if "orchestrator" in table]
    assert len(runs) == len(tables) - 1 == 2
    for text in runs:
        (tmp_path / "run.toml").write_text(f"max_steps = 1\n{text}")
        (env,) = load_config(tmp_path / "run.toml").orchestrator.env
        assert env.id == "guess_number:GuessNumber"


def test_what_the_configurations_name_is_there(folder: Path) -> None:
    code = (
        "import sys, tomllib\n"
        "from turnwise.config import RewardConfig\n"
        "from turnwise.envs import make\n"
        "from turnwise.envs.rewards import check_weights\n"
        "for text in sys.argv[1:]:\n"
        "    (table,) = tomllib.loads(text)['orchestrator']['env']\n"
        "    env = make(table['id'], table.get('args'))\n"
        "    check_weights(RewardConfig(**table.get('reward', {})), env.component_names, env_id=table['id'])\n"
        "    print(env.largest)\n"
    )
    assert run(folder, code, *(text for text in blocks("toml") if "orchestrator" in text)).split() == ["50", "100"]


def test_the_page_is_one_page() -> None:
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) < 330


def test_the_settings_of_musique_on_its_page_are_settings_of_musique() -> None:
    page = DOCS / "musique.md"
    (block,) = (text for text in blocks("toml", page) if 'id = "musique"' in text)
    (table,) = tomllib.loads(block)["orchestrator"]["env"]
    parameters = inspect.signature(MuSiQue).parameters
    assert make("musique", table["args"]).max_turns == parameters["max_turns"].default == 8
    for name in ("top_k", "snippet_chars", "corpus", "max_calls"):
        assert table["args"][name] == parameters[name].default
    sizes = re.findall(r"`(\w+_(?:reward|cost)) = ([\d.]+)`", page.read_text(encoding="utf-8"))
    assert {name: float(value) for name, value in sizes} == {
        name: p.default for name, p in parameters.items() if name.endswith(("_reward", "_cost"))
    }
