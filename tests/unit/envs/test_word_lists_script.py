"""Deriving the word lists, on a small package."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "make_word_lists.py"
FILES = {
    "english-words.10": "glass\nhouse\nbooks\nmenus\nspeed\nthe\nnaïve\nit's\n",
    "american-words.35": "color\nbaked\nkneel\n",
    "english-words.50": "aback\n",
    "british-words.70": "smoky\n",
    "variant_1-words.80": "smoke\n",
    "english-words.95": "zzzax\n",
    "australian-words.10": "billy\n",
}
ENABLE = "glass\nhouse\nbooks\nbook\nmenus\nmenu\nspeed\nbake\nbaked\ncolor\naahed\nlonger\n"


@pytest.fixture
def package(tmp_path: Path) -> list[str]:
    folder = tmp_path / "scowl"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="latin-1")
    (tmp_path / "enable1.txt").write_text(ENABLE)
    return ["--scowl", str(folder), "--enable", str(tmp_path / "enable1.txt"), "--out", str(tmp_path)]


def test_answers_are_common_words_of_both_lists_without_regular_forms(package: list[str], tmp_path: Path) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    assert main([*package, "--check"]) == 1
    assert not (tmp_path / "answers.txt").exists()
    assert main(package) == 0
    assert (tmp_path / "answers.txt").read_text().split() == ["color", "glass", "house", "menus", "speed"]
    allowed = "aahed aback baked books color glass house kneel menus smoke smoky speed"
    assert (tmp_path / "allowed.txt").read_text().split() == allowed.split()
    assert main([*package, "--check"]) == 0


def test_a_folder_without_the_package_is_refused(package: list[str], tmp_path: Path) -> None:
    package[1] = str(tmp_path)
    with pytest.raises(FileNotFoundError, match="unpack Debian's scowl package there"):
        runpy.run_path(str(SCRIPT))["main"](package)
