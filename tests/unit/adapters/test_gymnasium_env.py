"""Environments of `gymnasium.make` as ours."""

from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from support.gymnasium_games import Odd
from turnwise.adapters.gymnasium_env import GymnasiumEnv
from turnwise.envs import TextEnv, make

TAXI = next(game for game in ("Taxi-v4", "Taxi-v3") if game in gymnasium.registry)
LAKE: dict[str, Any] = {"actions": ["left", "down", "right", "up"], "env_args": {"is_slippery": False}}


def game(name: str, **args: Any) -> GymnasiumEnv:
    env = make(f"gymnasium:{name}", args)
    assert isinstance(env, GymnasiumEnv)
    return env


def replay(env: TextEnv, replies: list[str], *, split: str = "train", row: int = 0) -> list[Any]:
    trace: list[Any] = [env.reset(options={"task": env.tasks(split)[row]})[0]]
    for reply in replies:
        trace.append(env.step(reply))
        if env.over:
            break
    return trace


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("CartPole-v1", {"actions": ["left", "right"], "observation": "x {0:.2f}, angle {2:.2f}"}),
        ("FrozenLake-v1", LAKE),
        ("Blackjack-v1", {"actions": ["stick", "hit"], "observation_names": ["sum", "dealer", "ace"]}),
        (TAXI, {}),
        ("turnwise/wordle", {}),
        ("tests/Echo-v0", {}),
    ],
)
def test_an_adapted_environment_passes_gymnasiums_own_check(name: str, args: dict[str, Any]):
    check_env(game(name, **args), skip_render_check=True)


@pytest.mark.parametrize("name", ["CartPole-v1", "FrozenLake-v1", "Blackjack-v1", TAXI])
def test_the_same_seed_is_the_same_episode(name: str):
    replies = ["1", "0", "what?", "1", "1", "0"]
    first, again = game(name), game(name)
    assert replay(first, replies, row=3) == replay(again, replies, row=3) == replay(first, replies, row=3)


def test_tasks_differ_and_those_held_out_are_other_ones():
    env = game("Blackjack-v1")
    openings = {split: [replay(env, [], split=split, row=row)[0] for row in range(20)] for split in ("train", "validation")}
    assert openings["train"] != openings["validation"]
    assert len(set(openings["train"])) > 5
    assert env.tasks("validation")[0]["id"] == f"gymnasium/Blackjack-v1/{1 << 30}"


def test_a_scripted_player_crosses_the_lake():
    trace = replay(game("FrozenLake-v1", **LAKE), ["Down!", "go DOWN", "right", "right", "down", "right"])
    assert [step[0] for step in trace[1:]] == ["4", "8", "9", "10", "14", "15"]
    assert [step[1] for step in trace[1:]] == [0, 0, 0, 0, 0, 1.0]
    assert trace[-1][2:4] == (True, False)
    assert trace[-1][4]["reward_components"] == {"reward": 1.0}


def test_the_rewards_are_those_that_gymnasium_pays():
    plain = gymnasium.make("CartPole-v1")
    plain.reset(seed=5)
    paid = [plain.step(k % 2)[1:4] for k in range(30)]
    trace = replay(game("CartPole-v1", seed=5), [str(k % 2) for k in range(30)])
    assert [step[1:4] for step in trace[1:]] == paid[: len(trace) - 1]


def test_our_own_game_by_gymnasium_pays_what_it_pays_at_home():
    own, adapted = make("wordle"), game("turnwise/wordle")
    assert adapted.system_prompt == own.system_prompt
    for seed in range(20):
        adapted.reset(options={"task": {"id": "x", "seed": seed}})
        own.reset(seed=seed)
        for word in ("crane", "moist", "crane", "no guess", "bulky", "dwelt"):
            observation, reward, terminated, truncated, _ = own.step(word)
            assert adapted.step(word)[:4] == (observation, reward, terminated, truncated)
            if terminated:
                break


def test_an_unreadable_reply_costs_a_turn_and_nothing_happens():
    env = game("FrozenLake-v1", **LAKE, unreadable_penalty=0.25, max_turns=3)
    _, hint, moved, last = replay(env, ["no idea", "down", "leftwards"])
    assert hint[0] == "No action was read. Reply with one of these actions and nothing else: left, down, right, up."
    assert (hint[1], hint[4]["reward_components"], hint[4]["metrics"]) == (-0.25, {"unreadable": -0.25}, {"unreadable_rate": 1.0})
    assert moved[0] == "4"
    assert moved[4]["metrics"] == {"unreadable_rate": 0.5}
    assert last[1:4] == (-0.25, False, True)
    assert last[4]["metrics"]["unreadable_rate"] == pytest.approx(2 / 3)


def test_without_a_penalty_an_unreadable_reply_pays_nothing():
    assert replay(game("CartPole-v1"), ["?"])[1][4]["reward_components"] == {}


def test_max_turns_truncates_and_the_limit_of_the_registration_is_the_default():
    assert (game("CartPole-v1").max_turns, game("Blackjack-v1").max_turns, game("FrozenLake-v1").max_turns) == (500, 100, 100)
    trace = replay(game("FrozenLake-v1", **LAKE, max_turns=2), ["left", "left", "left"])
    assert [step[2:4] for step in trace[1:]] == [(False, False), (False, True)]


def test_text_goes_in_and_out_unchanged():
    env = game("tests/Echo-v0")
    trace = replay(env, ["héllo ☃", "", "cut"])
    assert env.system_prompt == "Say something."
    assert trace[1][:4] == ("HÉLLO ☃", 7.0, False, False)
    assert trace[3][:4] == ("CUT", 3.0, False, True)
    assert replay(env, ["stop"])[1][:4] == ("STOP", 4.0, True, False)
    assert trace[1][4]["metrics"] == {}


def test_instructions_name_the_actions():
    assert game("CartPole-v1", actions=["l", "r"]).system_prompt == "Reply with one of these actions and nothing else: l, r."
    assert game("CartPole-v1", actions=["l", "r"], instructions="Use {actions}. {x}").system_prompt == "Use l, r. {x}"
    assert game("tests/Echo-v0", instructions="Speak.").system_prompt == "Speak."


@settings(max_examples=50)
@given(replies=st.lists(st.text(), min_size=1, max_size=5))
def test_hostile_text_never_raises(replies: list[str]):
    trace = replay(game("FrozenLake-v1", **LAKE), replies)
    assert all(isinstance(step[0], str) for step in trace[1:])


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"reward": None}, "the reward of gymnasium:tests/Odd-v0 is None, not a number"),
        ({"reward": "1"}, "is '1', not a number"),
        ({"reward": float("nan")}, "is nan; it must be a finite number"),
        ({"observation": None}, "which is not of its space"),
        ({"observation": "x" * (1 << 21)}, "has 2097152 characters"),
    ],
)
def test_a_malformed_answer_is_an_error_and_not_0(answer: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        replay(game("tests/Odd-v0", env_args=answer), ["0"])


def test_what_a_game_raises_reaches_the_rollout():
    with pytest.raises(OSError, match="the game crashed"):
        replay(game("tests/Odd-v0", env_args={"broken": True}), ["0"])


def test_close_closes_the_game():
    before = Odd.closed
    game("tests/Odd-v0").close()
    assert Odd.closed == before + 1


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("Nope-v1", {}, r"gymnasium.make\('Nope-v1'\) failed .* args.import"),
        ("no_package:Nope-v1", {}, "No module named 'no_package'"),
        ("Pendulum-v1", {}, "action space Box.* is not supported"),
        ("CartPole-v1", {"env_args": {"gravity_on": 1}}, "gravity_on"),
        ("CartPole-v1", {"actions": ["left"]}, "1 names, but the environment has 2 actions"),
        ("CartPole-v1", {"action": ["left", "right"]}, r"args.action is not an argument .* Did you mean 'actions'\?.*import"),
        ("CartPole-v1", {"import": "no_package"}, "args.import = 'no_package' cannot be imported"),
        ("CartPole-v1", {"max_turns": 0}, "args.max_turns = 0 must be at least 1"),
        ("CartPole-v1", {"unreadable_penalty": -1}, "args.unreadable_penalty = -1 must be at least 0"),
        ("CartPole-v1", {"num_train": 0}, "args.num_train = 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_run(name: str, args: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        game(name, **args)


def test_a_package_is_imported_that_registers_its_games(monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    (tmp_path / "games_of_lore.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('lore/Cart-v0', entry_point='gymnasium.envs.classic_control:CartPoleEnv', max_episode_steps=7)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert game("lore/Cart-v0", **{"import": "games_of_lore"}).max_turns == 7
    finally:
        gymnasium.registry.pop("lore/Cart-v0", None)


def test_a_row_without_a_seed_is_refused():
    with pytest.raises(ValueError, match="'seed' must be a whole number"):
        game("CartPole-v1").reset(options={"task": {"id": "x"}})
