"""`turnwise envs`: what it says of environments, those that lack their data or cannot be made included."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from turnwise.cli.turnwise import run_command
from turnwise.envs import registry

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data at hand, a hub that cannot be reached, and one adapter."""

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.delenv("TURNWISE_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    monkeypatch.setattr(registry, "ADAPTERS", {"scheme": "turnwise.envs.wordle:Wordle"})


def test_all_environments_are_listed_with_tasks_tools_and_outcome(capsys: pytest.CaptureFixture[str]):
    assert run_command(["envs"]) == 0
    listed = capsys.readouterr().out
    assert "wordle\n    Find a hidden five-letter word in six guesses, each answered with a mark a letter.\n" in listed
    assert "    tasks: train 1,979, validation 100\n    outcome: win\n" in listed
    assert "    tools: search, read, answer\n    outcome: answer_em, answer_f1\n" in listed
    assert "scheme:NAME\n    Find a hidden five-letter word" in listed


def test_where_data_is_missing_the_list_says_which(capsys: pytest.CaptureFixture[str]):
    assert run_command(["envs"]) == 0
    listed = capsys.readouterr().out
    assert "    tasks: train ?, validation ?\n        train: data set 'openai/gsm8k', split 'train', cannot be loaded" in listed
    assert "        train: args.train = 'bdsaglam/musique,answerable,train': data set" in listed
    assert "HF_HUB_OFFLINE=0" in listed


def test_one_environment_is_told_in_detail(capsys: pytest.CaptureFixture[str]):
    assert run_command(["envs", "musique", "--max-turns", "3"]) == 0
    told = capsys.readouterr().out
    for line in (
        "    an episode: at most 3 replies",
        "    class: turnwise.envs.musique:MuSiQue",
        "    top_k: int = 3",
        "        paragraphs that a search shows when the call does not say how many.",
        "    search(query: string, k?: integer)",
    ):
        assert line in told.splitlines()
    assert '"required": ["query"]' in " ".join(told.split())
    assert "without a network give a JSONL file instead" in " ".join(told.split())  # the reason is not cut short


def test_tasks_are_counted_with_the_arguments_that_are_given(capsys: pytest.CaptureFixture[str]):
    args = ["--train", str(FIXTURES / "gsm8k_train.jsonl[:2]"), "--validation", str(FIXTURES / "gsm8k_test.jsonl[:1]")]
    assert run_command(["envs", "gsm8k", *args]) == 0
    assert "    tasks: train 2, validation 1\n" in capsys.readouterr().out


def test_json_holds_everything(capsys: pytest.CaptureFixture[str]):
    assert run_command(["envs", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert everything["adapters"]["scheme"].startswith("Find a hidden")
    by_id = {table["id"]: table for table in everything["environments"]}
    assert by_id.keys() >= {"gsm8k", "mlgym", "musique", "wordle"}
    assert [split["size"] for split in by_id["gsm8k"]["splits"]] == [None, None]
    assert [tool["name"] for tool in by_id["musique"]["tools"]] == ["search", "read", "answer"]
    assert by_id["musique"]["tools"][0]["parameters"]["required"] == ["query"]
    assert by_id["mlgym"]["uses_containers"] is True
    assert run_command(["envs", "wordle", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == by_id["wordle"]


def test_an_environment_that_cannot_be_made_is_told_as_far_as_it_is_known(capsys: pytest.CaptureFixture[str]):
    assert run_command(["envs", "wordle", "--max-turns", "0"]) == 2
    told = capsys.readouterr().out
    assert "    cannot be made: args.max_turns = 0 must be at least 1\n" in told
    assert "    reward components: feedback, format" in told


def test_arguments_without_an_environment_are_refused(capsys: pytest.CaptureFixture[str]):
    assert run_command(["envs", "--nonsense"]) == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
