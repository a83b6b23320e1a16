"""The game: turns, rewards, metrics."""

from itertools import pairwise

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.envs.wordle import Wordle
from turnwise.envs.wordle.scoring import (
    FEEDBACK,
    FORMAT_GOOD,
    WORD_GOOD,
    win_reward,
)


def play(env: Wordle, replies: list[str]) -> tuple[list[dict[str, float]], dict[str, float], tuple[bool, bool]]:
    """Components of each turn, the last metrics, and how it ended."""
    turns: list[dict[str, float]] = []
    metrics: dict[str, float] = {}
    ended = (False, False)
    for reply in replies:
        _, reward, terminated, truncated, info = env.step(reply)
        assert reward == pytest.approx(sum(info["reward_components"].values()))
        turns.append(info["reward_components"])
        metrics, ended = info["metrics"], (terminated, truncated)
        if any(ended):
            break
    return turns, metrics, ended


def frost(**args: object) -> Wordle:
    env = Wordle(answers=["frost"], **args)  # type: ignore[arg-type]
    env.reset(seed=0)
    return env


def test_check_env_finds_nothing_to_warn_of() -> None:
    check_env(gymnasium.make("turnwise/wordle").unwrapped)
    check_env(gymnasium.make("turnwise/wordle", style="tagged", history="last", max_turns=3).unwrapped)


def test_a_game_by_hand() -> None:
    env = frost()
    turns, metrics, ended = play(env, ["crane", "proud", "My guess is FROST"])
    assert ended == (True, False)
    assert turns[0] == pytest.approx({"format": 0.2 / 6, "valid_word": 0.2 / 6, "feedback": 0, "progress": 0.08, "win": 0})
    # the green r kept (1), no dead letter (1): full feedback; r and o in place, up from r alone
    assert turns[1] == pytest.approx({"format": 0.2 / 6, "valid_word": 0.2 / 6, "feedback": 0.5 / 6, "progress": 0.08, "win": 0})
    # five of seventeen characters are the word
    assert turns[2] == pytest.approx(
        {"format": (-0.3 + 0.4 * 5 / 17) / 6, "valid_word": 0.2 / 6, "feedback": 0.5 / 6, "progress": 0.24, "win": 1.84}
    )
    assert metrics == pytest.approx(
        {
            "valid_format_rate": 2 / 3,
            "invalid_word_rate": 0,
            "feedback_usage_rate": 1,
            "dead_letter_reuse_rate": 0,
            "distinct_guess_rate": 1,
            "win_rate": 1,
            "guesses_to_win": 3,
        }
    )


def test_a_lost_game_is_terminated_and_leaves_out_guesses_to_win() -> None:
    env = frost()
    turns, metrics, ended = play(env, ["crane", "crane", "zzzzz", "", "zzzzz", "slate"])
    assert ended == (True, False)
    assert [round(turn["feedback"] * 6, 6) for turn in turns] == [0, -0.5, 0, 0, 0, -0.5]
    assert [turn["valid_word"] > 0 for turn in turns] == [True, True, False, False, False, True]
    assert [round(turn["format"] * 6, 6) for turn in turns] == [0.2, 0.2, 0.2, -0.6, 0.2, 0.2]
    assert all(turn["win"] == 0 for turn in turns)
    assert "guesses_to_win" not in metrics
    assert metrics["win_rate"] == 0
    assert metrics["invalid_word_rate"] == pytest.approx(3 / 6)
    assert metrics["distinct_guess_rate"] == pytest.approx(3 / 5)  # crane, zzzzz, slate of five words
    assert metrics["dead_letter_reuse_rate"] == pytest.approx(2 / 5)  # crane again, slate; a, c, e, n were dead
    assert metrics["feedback_usage_rate"] == 0


def test_rates_over_no_guess_at_all_are_left_out() -> None:
    _, metrics, _ = play(frost(), ["", "zzzzz"])
    assert set(metrics) == {"valid_format_rate", "invalid_word_rate", "distinct_guess_rate", "win_rate"}


def test_stepping_after_the_end_is_refused() -> None:
    env = frost()
    play(env, ["frost"])
    with pytest.raises(RuntimeError, match=r"call reset\(\)"):
        env.step("frost")


def test_finish_owes_nothing_and_closes_the_game() -> None:
    env = frost()
    play(env, ["crane"])
    assert env.finish("context is full") == {}
    assert env.episode_metrics()["win_rate"] == 0
    with pytest.raises(RuntimeError):
        env.step("frost")


def test_the_best_and_the_worst_game() -> None:
    best, _, _ = play(frost(), ["frost"])
    assert sum(best[0].values()) == pytest.approx(0.4 / 6 + 0.4 + 2.4)
    worst, _, _ = play(frost(), [""] * 6)
    assert sum(sum(turn.values()) for turn in worst) == pytest.approx(-1.0)


POOL = ["frost", "crane", "proud", "roost", "eerie", "llama", "allay", "geese", "slate", "robot"]
replies = st.one_of(
    st.sampled_from(POOL),
    st.sampled_from([f"My guess is **{word.upper()}**" for word in POOL]),
    st.sampled_from(["", "zzzzz", "qqqqq!", "no idea", "<guess>zzzzz</guess>", "cranes"]),
    st.text(max_size=12),
)


@given(
    answer=st.sampled_from(POOL),
    actions=st.lists(replies, min_size=12, max_size=12),
    max_turns=st.integers(1, 12),
    style=st.sampled_from(["plain", "tagged"]),
)
@settings(deadline=None, max_examples=300)
def test_a_game_earns_between_minus_one_and_three(answer: str, actions: list[str], max_turns: int, style: str) -> None:
    env = Wordle(answers=POOL, max_turns=max_turns, style=style)
    env.reset(seed=0, options={"task": {"id": "x", "answer": answer}})
    turns, metrics, ended = play(env, actions)
    assert any(ended)
    assert -1.0 - 1e-9 <= sum(sum(turn.values()) for turn in turns) <= 3.0 + 1e-9
    for name, low, high in [("format", -0.6, 0.2), ("valid_word", -0.4, 0.2), ("feedback", -0.5, 0.5), ("progress", 0, 0.4)]:
        assert low - 1e-9 <= sum(turn[name] for turn in turns) <= high + 1e-9
    assert turns[0]["feedback"] == 0
    assert all(0 <= value <= 1 for name, value in metrics.items() if name != "guesses_to_win")


@pytest.mark.parametrize("max_turns", range(2, 30))
def test_winning_a_turn_sooner_always_earns_more_than_that_turn_could(max_turns: int) -> None:
    most = (FORMAT_GOOD + WORD_GOOD + FEEDBACK) / max_turns
    wins = [win_reward(turn, max_turns) for turn in range(1, max_turns + 1)]
    assert all(sooner - later > most for sooner, later in pairwise(wins))


def test_the_nearer_a_reply_comes_to_the_form_the_more_it_earns() -> None:
    replies = ["crane", "crane.", "My guess is CRANE.", "I think that the hidden word may well be crane today.", "no idea at all"]
    earned = [play(frost(), [reply])[0][0]["format"] * 6 for reply in replies]
    assert earned == sorted(earned, reverse=True)
    assert earned[0] == pytest.approx(0.2)
    assert earned[1] == pytest.approx(-0.3 + 0.4 * 5 / 6)
    assert earned[-1] == pytest.approx(-0.6)
    tagged = [
        play(frost(style="tagged"), [reply])[0][0]["format"] * 6 for reply in ("<guess>crane</guess>", "<guess>crane", "crane")
    ]
    assert tagged == pytest.approx([0.2, 0.1, -0.3])


def test_a_constant_word_earns_less_than_varied_guesses() -> None:
    constant, metrics, _ = play(frost(), ["crane"] * 6)
    varied, _, _ = play(frost(), ["crane", "broil", "proud", "droop", "groom", "prowl"])
    assert sum(sum(turn.values()) for turn in constant) < 0.1
    assert sum(sum(turn.values()) for turn in varied) > 0.5
    assert metrics["distinct_guess_rate"] == pytest.approx(1 / 6)
    assert metrics["feedback_usage_rate"] == 0


def test_a_guess_outside_the_list_gets_no_mask() -> None:
    env = frost()
    observation, *_ = env.step("froso")
    assert observation == "froso is not a 5-letter word that I know.\nTry 2 of 6."


def test_answers_may_be_guessed_even_when_the_allowed_list_lacks_them() -> None:
    env = Wordle(answers=["aaaab"], allowed=["crane"])
    env.reset(seed=0)
    turns, _, ended = play(env, ["aaaab"])
    assert ended == (True, False)
    assert turns[0]["valid_word"] > 0


def test_the_same_seed_draws_the_same_word() -> None:
    env, other = Wordle(), Wordle()
    drawn = [env.reset(seed=3)[1]["task_id"], *(env.reset()[1]["task_id"] for _ in range(5))]
    assert drawn == [other.reset(seed=3)[1]["task_id"], *(other.reset()[1]["task_id"] for _ in range(5))]
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("task", [{"id": "x"}, {"id": "x", "answer": "fro"}, {"id": "x", "answer": "fröst"}])
def test_a_task_without_a_word_is_refused(task: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="'answer' must be a word of 5 letters"):
        Wordle().reset(options={"task": task})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"max_turns": 0}, r"args\.max_turns = 0 must be at least 1"),
        ({"history": "some"}, r"args\.history = 'some' must be 'all' or 'last'"),
    ],
)
def test_bad_arguments_are_named(args: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wordle(**args)  # type: ignore[arg-type]
