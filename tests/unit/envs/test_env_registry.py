"""Names of environments."""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import gymnasium
import pytest

from turnwise.envs import load, make, register, registered, registry
from turnwise.envs.gsm8k import GSM8K
from turnwise.envs.wordle import Wordle

PLUGIN = '''
from turnwise.envs.wordle import Wordle

class Easy(Wordle):
    """Wordle with ten guesses."""
    def __init__(self, *, max_turns=10, **args):
        super().__init__(max_turns=max_turns, **args)

class NoEnvironment:
    pass

class Needy(Wordle):
    def __init__(self, lists, *, depth=1):
        super().__init__()
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of somebody else, and registries that forget it afterwards."""
    (tmp_path / "somebodys_games.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_REGISTRATIONS", dict(registry._REGISTRATIONS))
    before = set(gymnasium.registry)
    yield "somebodys_games"
    for name in set(gymnasium.registry) - before:
        del gymnasium.registry[name]
    sys.modules.pop("somebodys_games", None)


def test_both_environments_are_registered_with_their_descriptions() -> None:
    names = registered()
    assert names["wordle"].startswith("Find a hidden five-letter word")
    assert names["gsm8k"].startswith("Solve a grade-school word problem")


def test_make_passes_arguments_and_sets_a_spec_that_makes_the_same_again() -> None:
    env = make("wordle", {"answers": ["frost"], "max_turns": 4})
    assert isinstance(env, Wordle)
    assert env.max_turns == 4
    again = gymnasium.make(env.spec).unwrapped  # type: ignore[arg-type]
    assert isinstance(again, Wordle)
    assert (again.max_turns, again.tasks("train")) == (4, env.tasks("train"))
    assert isinstance(gymnasium.make("turnwise/gsm8k").unwrapped, GSM8K)


def test_a_class_can_be_named_directly(plugin: str) -> None:
    assert make(f"{plugin}:Easy", {"answers": ["frost"]}).max_turns == 10
    assert load(f"{plugin}:Easy").__name__ == "Easy"


def test_a_registered_class_has_a_name_here_and_in_gymnasium(plugin: str) -> None:
    register("easy", f"{plugin}:Easy", answers=["frost"])
    assert make("easy").tasks("train") == ({"id": "wordle/frost", "answer": "frost"},)
    assert make("easy", {"answers": ["crane"]}).tasks("train")[0]["answer"] == "crane"
    assert gymnasium.make("turnwise/easy").unwrapped.max_turns == 10  # type: ignore[attr-defined]
    assert registered()["easy"] == "Wordle with ten guesses."
    register("easy", f"{plugin}:Easy", answers=["frost"])  # the same again changes nothing
    with pytest.raises(ValueError, match=r"'easy' already stands for somebodys_games:Easy; choose another name"):
        register("easy", "turnwise.envs.wordle:Wordle")


def test_installed_packages_add_names_and_broken_ones_are_left_out(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("theirs", f"{plugin}:Easy", registry.ENTRY_POINT_GROUP),
        EntryPoint("wordle", f"{plugin}:Easy", registry.ENTRY_POINT_GROUP),
        EntryPoint("broken", "no class here", registry.ENTRY_POINT_GROUP),
        EntryPoint("gone", "module_that_is_gone:Env", registry.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    registry._register_installed.cache_clear()
    with pytest.warns(UserWarning, match="entry point 'broken' of group turnwise.envs is left out"):
        assert make("theirs").max_turns == 10
    assert load("wordle") is Wordle
    assert registered()["gone"].startswith("(unusable: environment module_that_is_gone:Env: module")
    registry._register_installed.cache_clear()


def test_an_installed_distribution_adds_its_entry_points(plugin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a package manager leaves beside the code: its metadata, found along `sys.path`."""
    metadata = tmp_path / "somebodys_games-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-games\nVersion: 1.0\n")
    with pytest.raises(ValueError, match="unknown environment 'patient-wordle'"):
        make("patient-wordle")
    (metadata / "entry_points.txt").write_text(f"[turnwise.envs]\npatient-wordle = {plugin}:Easy\n[other]\nx = y:Z\n")
    importlib.invalidate_caches()
    registry._register_installed.cache_clear()
    assert make("patient-wordle").max_turns == 10
    assert registered()["patient-wordle"] == "Wordle with ten guesses."
    assert gymnasium.make("turnwise/patient-wordle").unwrapped.max_turns == 10  # type: ignore[attr-defined]
    assert "x" not in registered()
    registry._register_installed.cache_clear()


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        (
            "wordel",
            r"unknown environment 'wordel'\. Did you mean 'wordle'\? "
            r"Known: gsm8k, mlgym, musique, wordle; or give 'package\.module:Class'",
        ),
        ("", r"unknown environment ''\. Known:"),
        ("no_such_module:Env", r"module 'no_such_module' cannot be imported: No module named"),
        ("turnwise.envs.wordle:Wordel", r"has no 'Wordel'\. Did you mean 'Wordle'\?"),
        ("somebodys_games:NoEnvironment", r"'NoEnvironment' is not a subclass of turnwise\.envs\.TextEnv"),
    ],
)
def test_unknown_ids_are_refused_with_what_is_known(plugin: str, env_id: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(env_id)


def test_arguments_are_checked_before_anything_is_made(plugin: str) -> None:
    with pytest.raises(
        ValueError, match=r"args\.max_turn is not an argument .*Did you mean 'max_turns'\? wordle takes answers, allowed"
    ):
        make("wordle", {"max_turn": 3})
    with pytest.raises(ValueError, match=r"environment 'somebodys_games:Needy' needs args\.lists\. .* takes lists, depth\."):
        make("somebodys_games:Needy", {"depth": 2})
    with pytest.raises(
        ValueError, match=r"'somebodys_games:Easy' cannot be made with args .*unexpected keyword argument 'other'"
    ):
        make("somebodys_games:Easy", {"other": 2})
    with pytest.raises(ValueError, match=r"'wordle' cannot be made with args \{'max_turns': 'six'\}: .*'str' and 'int'"):
        make("wordle", {"max_turns": "six"})


@pytest.mark.parametrize(
    ("name", "target"), [("a b", "m:C"), ("-x", "m:C"), ("ok", "m"), ("ok", "m:"), ("ok", "m x:C"), ("a:b", "m:C")]
)
def test_malformed_names_and_targets_are_refused(name: str, target: str) -> None:
    with pytest.raises(ValueError, match="environment"):
        register(name, target)


def test_importing_and_playing_loads_neither_torch_nor_datasets() -> None:
    code = (
        "import sys, turnwise.envs as envs, turnwise.envs.play, turnwise.envs.tasks\n"
        "env = envs.make('wordle'); env.reset(seed=0); env.step('crane'); envs.make('gsm8k'); envs.registered()\n"
        "print(sorted({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
