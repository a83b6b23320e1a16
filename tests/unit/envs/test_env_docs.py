"""The page on registering an environment: its example runs."""

import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "environments.md"
BLOCK = re.compile(r"^```python file=(?P<name>\S+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_example_of_the_page_runs_as_written(tmp_path: Path) -> None:
    blocks = {match["name"]: match["code"] for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8"))}
    assert list(blocks) == ["guess_number.py", "check.py"]
    for name, code in blocks.items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    more = (
        "import io, gymnasium\n"
        "from turnwise.envs.play import play\n"
        "assert gymnasium.make('turnwise/guess_number').unwrapped.largest == 100\n"
        "task = {'id': 'x', 'target': 7}\n"
        "print(play(make('guess_number:GuessNumber'), input=io.StringIO('9\\nx\\n7\\n'), output=io.StringIO(), task=task))\n"
    )
    (tmp_path / "check.py").write_text(blocks["check.py"] + more, encoding="utf-8")
    done = subprocess.run([sys.executable, "-W", "error", "check.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    # number-8 of 50 is lower than 20, 12 away: 38 of 50 nearer than at the start; then 0.98 - 0.1 + 1
    assert done.stdout.splitlines() == ["lower {'closer': 0.76}", "1.88"]


def test_the_page_is_one_page() -> None:
    assert len(PAGE.read_text(encoding="utf-8").splitlines()) < 120
