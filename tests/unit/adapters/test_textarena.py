"""Games of textarena, against a small one that speaks its protocol."""

import random
import sys
from threading import Thread
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import fake_textarena
from support.textarena_games import game, replay
from turnwise.adapters.textarena import TextArena


@pytest.fixture(autouse=True)
def arena(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textarena", fake_textarena.module())


def test_a_game_of_one_player_is_played_to_its_end():
    env = game("Guess-v0")
    secret = _secret(env)
    trace = replay(env, [str(digit) for digit in range(10)])
    assert trace[0] == "Guess a digit."
    assert len(trace) == secret + 2
    assert trace[-1][:4] == ("You found it.", 1.0, True, False)
    assert trace[-1][4] == {
        "reward_components": {"reward": 1.0},
        "metrics": {"finished": 1.0, "ended_by_invalid_move": 0.0},
    }


def test_the_policys_own_words_are_not_told_again():
    told = replay(game("Guess-v0"), ["rubbish"])[1]
    assert told[:4] == ("That move is invalid.", 0.0, False, False)


def test_an_invalid_move_that_ends_the_game_is_counted():
    last = replay(game("Guess-v0"), ["rubbish", "more"])[-1]
    assert last[1:3] == (-1.0, True)
    assert last[4]["metrics"] == {"finished": 1.0, "ended_by_invalid_move": 1.0}


def test_the_same_seed_is_the_same_game_whatever_else_draws():
    first, again = game("Guess-v0"), game("Guess-v0")
    secret = _secret(first, row=1)
    wrong = [str(digit) for digit in range(10) if digit != secret][:3]
    trace = [first.reset(options={"task": first.tasks("train")[1]})[0]]
    for reply in wrong:
        replay(again, ["5", "6"], row=7)
        random.random()
        trace.append(first.step(reply))
    assert trace == replay(again, wrong, row=1)
    assert any(replay(first, ["1"], row=row)[1] != replay(first, ["1"], row=0)[1] for row in range(1, 4))


def test_games_leave_the_global_generator_as_it_was():
    env = game("Guess-v0")
    random.seed(3)
    expected = random.random()
    random.seed(3)
    replay(env, ["1", "2"])
    assert random.random() == expected


def test_games_on_many_threads_are_those_played_alone():
    alone = [replay(game("Guess-v0"), ["1", "2", "3"], row=row) for row in range(8)]
    together: dict[int, Any] = {}
    envs = [game("Guess-v0") for _ in range(8)]
    threads = [
        Thread(target=lambda row=row: together.update({row: replay(envs[row], ["1", "2", "3"], row=row)})) for row in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[row] for row in range(8)] == alone


def test_an_opponent_plays_at_random_and_never_an_invalid_move():
    env = game("TicTacToe-v0")
    outcomes = [0, 0]
    for row in range(20):
        env.reset(options={"task": env.tasks("train")[row]})
        while not env.over:
            place = next(iter(env.game.env.env.left))
            observation, reward, _, _, info = env.step(str(place))
        assert "invalid" not in observation
        assert info["metrics"] == {"finished": 1.0, "ended_by_invalid_move": 0.0, "win": float(reward > 0)}
        outcomes[int(reward > 0)] += 1
    assert min(outcomes) > 2


def test_an_instance_plays_each_game_as_a_new_one_does():
    used = game("TicTacToe-v0")
    for row in range(6):
        assert replay(used, ["0", "1", "2", "3"], row=row) == replay(game("TicTacToe-v0"), ["0", "1", "2", "3"], row=row)


def test_seats_change_from_task_to_task_unless_one_is_given():
    def first_mover(env: TextArena, row: int) -> bool:
        return "[Player 0]" in replay(env, [], row=row)[0]

    assert [first_mover(game("TicTacToe-v0"), row) for row in range(4)] == [False, True, False, True]
    assert [first_mover(game("TicTacToe-v0", player=1), row) for row in range(2)] == [True, True]
    assert [first_mover(game("TicTacToe-v0", player=0), row) for row in range(2)] == [False, False]


def test_a_game_that_is_cut_off_says_so_and_pays_what_the_user_set():
    env = game("Guess-v0", max_turns=1, unfinished_reward=-0.5)
    wrong = next(str(digit) for digit in range(10) if digit != _secret(env))
    last = replay(env, [wrong])[-1]
    assert last[1:4] == (-0.5, False, True)
    assert last[4]["metrics"] == {"finished": 0.0}
    replay(env, [])
    assert env.finish("context_full") == {"reward": -0.5}


def _secret(env: TextArena, row: int = 0) -> int:
    replay(env, [], row=row)
    return env.game.env.env.secret


@pytest.mark.parametrize(
    ("reward", "told"),
    [(None, "is None, not a number"), ("1", "is '1', not a number"), (float("nan"), "is nan; it must be a finite number")],
)
def test_a_malformed_reward_is_an_error_and_not_0(reward: object, told: str):
    env = game("Guess-v0", env_args={"reward": reward})
    with pytest.raises(ValueError, match=f"the reward of player 0 in textarena:Guess-v0 {told}"):
        replay(env, [str(_secret(env))])


def test_a_game_that_raises_says_on_which_move():
    with pytest.raises(RuntimeError, match=r"textarena:Guess-v0 failed on the move '7': UnboundLocalError: player_guess"):
        replay(game("Guess-v0", env_args={"crash": True}), ["7"])


def test_an_opponent_without_a_valid_move_is_an_error_and_no_victory():
    env = game("TakeOne-v0", opponent_actions=["[9]"], player=1)
    with pytest.raises(RuntimeError, match=r"has no valid move among \[9\]; give all that the game has by args.opponent_actions"):
        replay(env, [])


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(replies=st.lists(st.text(), min_size=1, max_size=4))
def test_hostile_text_is_an_invalid_move_and_nothing_worse(replies: list[str]):
    for name in ("Guess-v0", "TicTacToe-v0"):
        assert all(isinstance(step[0], str) for step in replay(game(name), replies)[1:])


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("Words-v0", {}, "needs word lists that NLTK fetches from the network, .* python -m nltk.downloader words"),
        ("Crowd-v0", {}, "no game of one or two players .* it keeps a FFAMultiPlayerState"),
        ("TakeOne-v0", {}, "no opponent is known. Opponents play TicTacToe, .* args.opponent_actions"),
        ("TakeOne-v0", {"opponent_actions": []}, r"args.opponent_actions = \[\] must be a list of actions"),
        ("Gues-v0", {}, r"textarena has no game 'Gues-v0'. Did you mean 'Guess-v0'\?"),
        ("Guess-v0", {"env_args": {"size": 3}}, "cannot be made with args.env_args = {'size': 3}"),
        ("Guess-v0", {"player": 2}, "args.player = 2 must be 0 or 1"),
        ("Guess-v0", {"max_turns": 0}, "args.max_turns = 0 must be at least 1"),
        ("Guess-v0", {"unfinished_reward": float("nan")}, "args.unfinished_reward is nan"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run(name: str, args: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        game(name, **args)


def test_a_missing_package_is_answered_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "textarena", None)
    with pytest.raises(ValueError, match=r"pip install 'turnwise\[textarena\]'"):
        game("Guess-v0")
