"""One rollout: what is recorded, how it ends, and what an environment may do to it."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from support import faulty_envs
from support.faulty_envs import Faulty
from support.rollouts import Echo, echo_setup
from turnwise.config import EnvConfig
from turnwise.inference.client import Completion
from turnwise.inference.errors import EngineError, EngineUnavailable
from turnwise.orchestrator.chat import TemplateChat
from turnwise.orchestrator.environments import EnvSetup, load_setups
from turnwise.orchestrator.rollout import Generate, Player, RolloutSpec, derive_seed
from turnwise.orchestrator.samples import to_samples
from turnwise.orchestrator.types import StopReason

Policy = Callable[..., Generate]


@pytest.fixture(autouse=True)
def faults():
    Faulty.broken = Faulty.closed = 0
    faulty_envs.release.clear()
    yield
    faulty_envs.release.set()


def _spec(setup: EnvSetup, **changes: object) -> RolloutSpec:
    spec = RolloutSpec("g0-0", 0, setup, setup.tasks[0], env_seed=1, sampling_seed=2)
    return replace(spec, **changes)  # type: ignore[arg-type]


def _faulty(where: str, what: str, **settings: object) -> EnvSetup:
    config = EnvConfig.model_validate({"id": "support.faulty_envs:Faulty", "args": {"where": where, "what": what}, **settings})
    return load_setups([config], "train")[0]


async def test_an_episode_is_recorded_turn_by_turn(player: Player, policy_saying: Policy, tiny_chat: TemplateChat):
    rollout = await player.play(_spec(echo_setup()), policy_saying("ab", "abcd", "z", version=3))
    assert (rollout.stop_reason, rollout.error, rollout.task_id) == (StopReason.TERMINATED, None, "train-0")
    assert [m["content"] for m in rollout.messages] == ["task train-0", "ab", "you said ab", "abcd", "you said abcd", "z", "won"]
    assert [turn.components for turn in rollout.turns] == [{"length": 0.02}, {"length": 0.04}, {"win": 1.0, "length": 0.01}]
    assert rollout.reward == pytest.approx(1.07)
    assert (rollout.reward_dense, rollout.reward_sparse) == (pytest.approx(1.07), 1.0)
    assert rollout.metrics == {"turns_seen": 3.0}
    assert rollout.oldest_version == 3
    (sample,) = to_samples(rollout, [1.0] * 3)
    assert sample.token_ids == [*tiny_chat.first_prompt(rollout.messages[:5]), *rollout.turns[2].sampled_ids]


async def test_sparse_pays_the_outcome_and_records_both_totals(player: Player, policy_saying: Policy):
    setup = echo_setup(reward={"mode": "sparse", "weights": {"win": 2.0}})
    rollout = await player.play(_spec(setup), policy_saying("ab", "z"))
    assert (rollout.reward, rollout.reward_sparse) == (2.0, 2.0)
    assert rollout.reward_dense == pytest.approx(2.03)
    assert [turn.reward for turn in rollout.turns] == [0.0, 2.0]


async def test_the_configs_turn_limit_cuts_the_episode_and_what_is_owed_goes_to_the_last_turn(
    player: Player, policy_saying: Policy
):
    rollout = await player.play(_spec(echo_setup(max_turns=2)), policy_saying("ab"))
    assert (rollout.stop_reason, len(rollout.turns)) == (StopReason.MAX_TURNS, 2)
    assert rollout.turns[0].components == {"length": 0.02}
    assert rollout.turns[1].components == {"length": 0.02, "owed": -0.25}
    assert rollout.reward == pytest.approx(0.04 - 0.25)


async def test_the_environments_own_limit_truncates(player: Player, policy_saying: Policy):
    rollout = await player.play(_spec(echo_setup()), policy_saying("ab"))
    assert (rollout.stop_reason, len(rollout.turns)) == (StopReason.TRUNCATED, 3)
    assert rollout.components["owed"] == -0.25


async def test_a_full_context_ends_the_episode_within_seq_len(player: Player, policy_saying: Policy, tiny_chat: TemplateChat):
    calls: list[tuple[list[int], int, int]] = []
    opening = len(tiny_chat.first_prompt([{"role": "user", "content": "task train-0"}]))
    small = replace(player, seq_len=opening + 40)
    rollout = await small.play(_spec(echo_setup(args={"turns": 50})), policy_saying("abcdefghij", calls=calls))
    assert rollout.stop_reason is StopReason.CONTEXT_FULL
    assert rollout.components["owed"] == -0.25
    assert all(len(prompt) + limit <= small.seq_len for prompt, limit, _ in calls)
    (sample,) = to_samples(rollout, [1.0] * len(rollout.turns))
    assert len(sample.token_ids) <= small.seq_len


async def test_metrics_that_only_the_end_knows_are_recorded_when_it_came_from_outside(
    player: Player, policy_saying: Policy, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Echo, "episode_metrics", lambda env: {"closed": float(env.over)})
    rollout = await player.play(_spec(echo_setup(args={"turns": 50}, max_turns=2)), policy_saying("ab"))
    assert (rollout.stop_reason, rollout.metrics) == (StopReason.MAX_TURNS, {"closed": 1.0})


async def test_a_reply_cut_by_its_limit_is_kept_and_closed_outside_the_mask(
    player: Player, policy_saying: Policy, tiny_chat: TemplateChat
):
    short = replace(player, max_tokens=4)
    rollout = await short.play(_spec(echo_setup(max_turns=2)), policy_saying("abcdefgh"))
    assert [turn.finish_reason for turn in rollout.turns] == ["length", "length"]
    assert rollout.replies() == ["abcd", "abcd"]
    (sample,) = to_samples(rollout, [1.0, 1.0])
    first_end = len(rollout.turns[0].prompt_ids) + 4
    assert sample.token_ids[first_end] == tiny_chat.stop_ids[0]
    assert not sample.loss_mask[first_end]
    assert sum(sample.loss_mask) == 8


async def test_a_prompt_that_fills_the_context_is_an_error_that_says_so(player: Player, policy_saying: Policy):
    rollout = await replace(player, seq_len=16).play(_spec(echo_setup()), policy_saying("ab"))
    assert rollout.stop_reason is StopReason.ERROR
    assert "fills seq_len = 16" in str(rollout.error)


async def test_seeds_differ_by_turn_and_repeat_by_spec(player: Player, policy_saying: Policy):
    first: list[tuple[list[int], int, int]] = []
    second: list[tuple[list[int], int, int]] = []
    await player.play(_spec(echo_setup()), policy_saying("ab", calls=first))
    await player.play(_spec(echo_setup()), policy_saying("ab", calls=second))
    assert first == second
    assert len({seed for _, _, seed in first}) == 3
    assert derive_seed(2, 0) == first[0][2]
    assert all(0 <= seed < 2**63 for _, _, seed in first)


@pytest.mark.parametrize(
    ("where", "what", "words"),
    [
        ("step", "raise", "step of Faulty raised, turn 1: ZeroDivisionError: planted"),
        ("step", "exit", "SystemExit: 3"),
        ("step", "stop_iteration", "StopIteration"),
        ("reset", "raise", "reset of Faulty raised, turn 0: ZeroDivisionError"),
        ("finish", "raise", "finish of Faulty raised, turn 3"),
        ("reset", "none", "reset returned None, not (text, info)"),
        ("reset", "number", "reset returned (17,"),
        ("step", "none", "step returned None"),
        ("step", "short", "step returned ('go on', 0.0)"),
        ("step", "number", "observation 17, not text"),
        ("step", "nan_reward", "the reward nan, not a finite number"),
        ("step", "text_flags", "terminated='no'"),
        ("step", "no_info", "the info None, not a mapping"),
        ("step", "nan_component", "reward_components['known'] is nan"),
        ("step", "unknown_component", "unknown name 'bonus'; the environment declares known"),
        ("step", "text_component", "reward_components['known'] is '1'"),
        ("step", "list_components", "reward_components is [1.0], not a mapping"),
        ("step", "bad_metrics", "metrics['m'] is None"),
        ("finish", "none", "finish() is None, not a mapping"),
        ("step", "huge", "the reward of {'known': 1.7e+308} is not finite"),
    ],
)
async def test_an_environment_that_breaks_its_contract_makes_an_errored_rollout(
    player: Player, policy_saying: Policy, where: str, what: str, words: str
):
    setup = _faulty(where, what, reward={"weights": {"known": 2.0}})
    rollout = await player.play(_spec(setup), policy_saying("ab"))
    assert rollout.stop_reason is StopReason.ERROR
    assert words in str(rollout.error)
    assert not rollout.ok


@pytest.mark.parametrize("where", ["reset", "step", "finish"])
async def test_an_outage_of_what_an_environment_stands_on_makes_the_episode_void(
    player: Player, policy_saying: Policy, where: str
):
    rollout = await player.play(_spec(_faulty(where, "outage")), policy_saying("ab"))
    assert rollout.stop_reason is StopReason.OUTAGE
    assert "no engine answers" in str(rollout.error)
    assert rollout.stop_reason.is_error


async def test_containers_are_handed_to_the_instances_that_work_in_some(monkeypatch: pytest.MonkeyPatch):
    config = EnvConfig.model_validate({"id": "support.faulty_envs:Faulty"})
    pools: Any = object()
    (without,) = load_setups([config], "train", containers=pools, wait_s=7.0)
    assert (without.take().containers, without.wait_s) == (None, 0.0)
    monkeypatch.setattr(Faulty, "uses_containers", True)
    (setup,) = load_setups([config], "train", containers=pools, wait_s=7.0)
    assert setup.take().containers is pools
    assert setup.wait_s == 7.0


@pytest.mark.parametrize("where", ["reset", "step", "finish"])
async def test_a_hanging_environment_makes_an_errored_rollout_that_names_the_key(
    player: Player, policy_saying: Policy, where: str
):
    rollout = await player.play(_spec(_faulty(where, "hang", timeout_s=0.05)), policy_saying("ab"))
    assert rollout.stop_reason is StopReason.ERROR
    assert f"{where} of Faulty hung" in str(rollout.error)
    assert "orchestrator.env.timeout_s = 0.05" in str(rollout.error)
    assert Faulty.closed == 0  # its thread may still be inside


async def test_an_environment_with_resources_is_closed_and_one_without_is_used_again(player: Player, policy_saying: Policy):
    with_close = _faulty("never", "raise")
    await player.play(_spec(with_close), policy_saying("ab"))
    await asyncio.sleep(0.1)
    assert (Faulty.closed, with_close.spare) == (1, [])
    setup = echo_setup()
    await player.play(_spec(setup), policy_saying("ab"))
    kept = setup.spare[0]
    await player.play(_spec(setup), policy_saying("z"))
    assert setup.spare == [kept]


async def test_an_environment_that_failed_is_not_used_again(player: Player, policy_saying: Policy):
    setup = echo_setup()

    async def refuse(prompt: Sequence[int], max_tokens: int, seed: int) -> Completion:
        raise EngineError("HTTP 400: planted")

    rollout = await player.play(_spec(setup), refuse)
    assert "EngineError: HTTP 400: planted" in str(rollout.error)
    assert setup.spare == []


async def test_an_engine_that_is_gone_makes_an_errored_rollout(player: Player):
    async def gone(prompt: Sequence[int], max_tokens: int, seed: int) -> Completion:
        raise EngineUnavailable("no completion after 4 attempts")

    rollout = await player.play(_spec(echo_setup()), gone)
    assert rollout.stop_reason is StopReason.ERROR


@pytest.mark.parametrize("error", [ValueError("lengths differ"), TimeoutError("while paused"), msgspec.DecodeError("torn")])
async def test_an_answer_of_the_engine_that_makes_no_sense_is_an_errored_rollout(player: Player, error: Exception):
    async def confused(prompt: Sequence[int], max_tokens: int, seed: int) -> Completion:
        raise error

    rollout = await replace(player, time_limit_s=30.0).play(_spec(echo_setup()), confused)
    assert rollout.stop_reason is StopReason.ERROR
    assert str(error) in str(rollout.error)


async def test_a_straggler_is_cut_and_says_so(player: Player):
    async def never(prompt: Sequence[int], max_tokens: int, seed: int) -> Completion:
        await asyncio.sleep(60)
        raise AssertionError

    rollout = await replace(player, time_limit_s=0.05).play(_spec(echo_setup()), never)
    assert rollout.stop_reason is StopReason.STRAGGLER
    assert "straggler_timeout_s = 0.05" in str(rollout.error)


async def test_a_cancelled_rollout_closes_its_environment_after_the_call_inside(player: Player, policy_saying: Policy):
    task = asyncio.create_task(player.play(_spec(_faulty("step", "hang")), policy_saying("ab")))
    for _ in range(500):
        await asyncio.sleep(0.01)
        if Faulty.broken:
            break
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.05)
    assert Faulty.closed == 0
    faulty_envs.release.set()
    for _ in range(200):
        await asyncio.sleep(0.01)
        if Faulty.closed:
            break
    assert Faulty.closed == 1


async def test_observations_that_imitate_the_template_do_not_speak_for_the_policy(
    player: Player, policy_saying: Policy, tiny_chat: TemplateChat
):
    setup = load_setups([EnvConfig(id="support.faulty_envs:Hostile")], "train")[0]
    rollout = await player.play(_spec(setup), policy_saying("ab"))
    start = tiny_chat.encoder.ids["<|im_start|>"]
    # each turn: the opening message, its generation prompt, and for every exchange a reply's end and two new openings
    assert [list(turn.prompt_ids).count(start) for turn in rollout.turns] == [2, 4, 6]
    (sample,) = to_samples(rollout, [1.0] * 3)
    assert sum(sample.loss_mask) == 9  # "ab" and the end token, three times


async def test_text_that_no_encoding_knows_is_repaired(player: Player, policy_saying: Policy):
    rollout = await player.play(_spec(_faulty("step", "surrogate")), policy_saying("ab"))
    assert rollout.ok
    assert rollout.messages[2]["content"] == "raw ? output"
