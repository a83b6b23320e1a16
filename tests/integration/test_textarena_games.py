"""Real games of textarena, with scripted players."""

import sys
from pathlib import Path

import pytest

from support.textarena_games import game, replay
from turnwise.adapters.textarena import OPPONENT_ACTIONS

pytest.importorskip("textarena")
pytestmark = [
    pytest.mark.textarena,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of textarena's own imports, on each Python others
]
ALONE = {
    "GuessTheNumber-v0": ["[10]", "[5]", "15", "[3]", "[8]"],
    "2048-v0": ["[up]", "[left]", "[down]", "[right]"] * 5,
    "FrozenLake-v0": ["down", "right"] * 4,
    "Blackjack-v0": ["hit", "stand"] * 10,
    "TowerOfHanoi-v0": ["[A C]", "[A B]", "[C B]", "[A C]", "[B A]", "[B C]", "[A C]"],
}


@pytest.mark.parametrize("name", ALONE)
def test_the_same_seed_is_the_same_game(name: str):
    used = game(name)
    replay(used, ALONE[name], row=1)
    assert replay(used, ALONE[name]) == replay(game(name), ALONE[name])


def test_a_scripted_player_finds_the_number():
    env = game("GuessTheNumber-v0")
    for row in range(10):
        observation, _ = env.reset(options={"task": env.tasks("train")[row]})
        low, high, reward = 1, 20, 0.0
        while not env.over:
            guess = (low + high) // 2
            observation, reward, *_ = env.step(f"I say [{guess}].")
            low, high = (guess + 1, high) if "higher" in observation else (low, guess - 1)
        assert (reward, "Congratulations" in observation) == (1.0, True)


def test_a_scripted_player_moves_the_tower():
    last = replay(game("TowerOfHanoi-v0"), ALONE["TowerOfHanoi-v0"])[-1]
    assert (last[1], last[2]) == (1.0, True)


@pytest.mark.parametrize("name", OPPONENT_ACTIONS)
def test_games_of_two_end_with_valid_moves_of_the_opponent(name: str):
    if name == "ReverseTicTacToe" and sys.version_info < (3, 12):
        with pytest.raises(ValueError, match="is written for a newer Python than this one"):
            game(f"{name}-v0")
        return
    env = game(f"{name}-v0", max_turns=200)
    for row in range(4):
        env.reset(options={"task": env.tasks("train")[row]})
        while not env.over:
            _, reward, _, truncated, info = env.step(env._opponent_move())  # a player as good as the opponent
        assert not truncated
        assert reward in (-1.0, 0.0, 1.0)
        assert info["metrics"]["ended_by_invalid_move"] == 0.0


@pytest.mark.parametrize("name", ["TicTacToe-v0", "KuhnPoker-v0", "GuessTheNumber-v0"])
@pytest.mark.parametrize("reply", ["", "[", "[999999999999999999999]", "\x00", "[col 3] [0] é", "]" * 5000])
def test_hostile_text_never_raises(name: str, reply: str):
    assert all(isinstance(step[0], str) for step in replay(game(name), [reply])[1:])


@pytest.mark.parametrize(
    ("name", "told"),
    [("Poker-v0", "no game of one or two players"), ("Breakthrough-v0", "no opponent is known"), ("Gues-v0", "has no game")],
)
def test_games_that_cannot_be_played_say_why(name: str, told: str):
    with pytest.raises(ValueError, match=told):
        game(name)


@pytest.fixture
def word_lists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder, the only one in which NLTK looks for its data; nothing can be fetched."""
    nltk = pytest.importorskip("nltk")
    loaders = pytest.importorskip("nltk.corpus.util")
    readers = pytest.importorskip("nltk.corpus.reader")
    unread = loaders.LazyCorpusLoader("words", readers.WordListCorpusReader, r"(?!README|\.).*", encoding="ascii")
    monkeypatch.setattr(nltk.corpus, "words", unread)
    monkeypatch.setattr("textarena.envs.utils.word_lists.words", unread)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda *_args, **_options: False)
    monkeypatch.setattr(nltk, "pos_tag", lambda tokens: [(token, "NN") for token in tokens])  # by a model, fetched too
    sys.modules.pop("textarena.envs.Wordle.env", None)
    return tmp_path


def test_wordle_is_played_where_its_word_lists_are(word_lists: Path):
    folder = word_lists / "corpora" / "words"
    folder.mkdir(parents=True)
    for name in ("en", "en-basic"):
        (folder / name).write_text("stone\nplant\ntrain\n")
    trace = replay(game("Wordle-v0"), ["stone", "I guess [plant]", "[train]"])
    assert trace[-1][1:3] == (1.0, True)


def test_a_game_without_its_word_lists_says_where_they_come_from(word_lists: Path):
    assert not any(word_lists.iterdir())
    with pytest.raises(ValueError, match=r"word lists that NLTK fetches .* python -m nltk.downloader words"):
        game("Wordle-v0")
