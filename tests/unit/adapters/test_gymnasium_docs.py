"""The examples of docs/adapters.md on Gymnasium."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from support import fake_reasoning_gym, fake_textarena
from turnwise.config import EnvConfig
from turnwise.envs import TextEnv, make

PAGE = Path(__file__).parents[3] / "docs" / "adapters.md"
SECTION = re.search(r"\n## Gymnasium, textarena, reasoning-gym\n(.*?)(?=\n## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", SECTION[1] if SECTION else "", re.DOTALL)


def made(text: str) -> TextEnv:
    table = EnvConfig.model_validate(tomllib.loads(text)["orchestrator"]["env"][0])
    return make(table.id, table.args)


def test_the_section_has_the_examples_that_are_tested_here():
    assert [kind for kind, _ in BLOCKS] == ["toml", "python", "toml", "toml", "toml"]


def test_frozen_lake_begins_as_the_page_says():
    env = made(BLOCKS[0][1])
    assert env.system_prompt.endswith("Reply with one word: left, down, right, up.")
    assert env.reset(seed=0)[0] == "You stand on square 0 of 0 to 15."
    assert env.step("Down")[0] == "You stand on square 4 of 0 to 15."


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_our_game_plays_as_a_vector(capsys: pytest.CaptureFixture[str]):
    exec(BLOCKS[1][1], {})
    assert "Try 2 of 6." in capsys.readouterr().out


def test_the_other_tables_are_arguments_of_their_environments(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fake_textarena, "REGISTRY", {"GuessTheNumber-v0": fake_textarena.Guess})
    monkeypatch.setitem(sys.modules, "textarena", fake_textarena.module())
    for name, module in fake_reasoning_gym.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(
        fake_reasoning_gym.DATASETS, "leg_counting", lambda max_animals=0, **rest: fake_reasoning_gym.Sums(**rest)
    )
    monkeypatch.setitem(fake_reasoning_gym.DATASETS, "chain_sum", lambda max_terms, **rest: fake_reasoning_gym.Sums(**rest))
    for _, text in BLOCKS[2:]:
        assert made(text).tasks("train")
