"""The page on environments: its examples run, and what it says of MuSiQue is so."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from turnwise.envs import make
from turnwise.envs.musique import MuSiQue

PAGE = Path(__file__).parents[3] / "docs" / "environments.md"
TOML = re.compile(r"^```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python file=(?P<name>\S+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_page_run_as_written(tmp_path: Path) -> None:
    blocks = {match["name"]: match["code"] for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))}
    assert list(blocks) == ["guess_number.py", "check.py", "almanac.py"]
    for name, code in blocks.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    more = (
        "import io, gymnasium\n"
        "from turnwise.envs.play import play\n"
        "assert gymnasium.make('turnwise/guess_number').unwrapped.largest == 100\n"
        "task = {'id': 'x', 'target': 7}\n"
        "env = make('almanac:Almanac')\n"
        "check_env(env)\n"
        "print([tool.name for tool in env.tools], env.tools[0].parameters['properties']['lines'])\n"
        "lines = 'look_up Narnia\\nlook_up(country=\"Peru\")\\nanswer Lima\\n'\n"
        "print(play(env, input=io.StringIO(lines), output=io.StringIO(), task={'id': 'x', 'country': 'Peru'}))\n"
        "print(play(make('guess_number:GuessNumber'), input=io.StringIO('9\\nx\\n7\\n'), output=io.StringIO(), task=task))\n"
    )
    (tmp_path / "check.py").write_text(blocks["check.py"] + more, encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "error", "check.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    # number-8 of 50 is lower than 20, 12 away: 38 of 50 nearer than at the start; then 0.98 - 0.1 + 1
    lines = "{'type': 'integer', 'description': 'how many lines to show', 'default': 1}"
    expected = ["lower {'closer': 0.76}", f"['look_up', 'answer'] {lines}", "1.1", "1.88"]
    assert done.stdout.splitlines() == expected


def test_the_page_is_one_page() -> None:
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) < 240


def test_the_settings_of_musique_on_the_page_are_settings_of_musique() -> None:
    (block,) = (text for text in TOML.findall(PAGE.read_text(encoding="utf-8")) if 'id = "musique"' in text)
    (table,) = tomllib.loads(block)["orchestrator"]["env"]
    parameters = inspect.signature(MuSiQue).parameters
    assert make("musique", table["args"]).max_turns == parameters["max_turns"].default == 8
    for name in ("top_k", "snippet_chars", "corpus", "max_calls"):
        assert table["args"][name] == parameters[name].default
    sizes = re.findall(r"`(\w+_(?:reward|cost)) = ([\d.]+)`", PAGE.read_text(encoding="utf-8"))
    assert {name: float(value) for name, value in sizes} == {
        name: p.default for name, p in parameters.items() if name.endswith(("_reward", "_cost"))
    }
