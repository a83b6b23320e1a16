"""DAPO's overlong penalty: the formula, who pays it and when, and what stays free of it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.rollouts import ECHO, Echo, echo_setup, make_config
from turnwise.config import EnvConfig, RLConfig
from turnwise.envs.base import Step
from turnwise.orchestrator.advantage import turn_advantages
from turnwise.orchestrator.chat import TemplateChat
from turnwise.orchestrator.env_threads import EnvThreads
from turnwise.orchestrator.environments import EnvSetup, load_setups
from turnwise.orchestrator.evaluate import eval_metrics
from turnwise.orchestrator.metrics import mean_by_name
from turnwise.orchestrator.overlong import OverlongPenalty
from turnwise.orchestrator.rollout import Generate, Player, RolloutSpec
from turnwise.orchestrator.types import Rollout

Policy = Callable[..., Generate]
TASK = {"id": "1", "question": "1 + 1?", "answer": "#### 2"}


class Clashing(Echo):
    """An environment with a component of the penalty's name."""

    component_names = frozenset({"length", "overlong"})

    def step(self, action: str) -> Step:
        return self.answer("", components={"overlong": 1.0})


def spec(setup: EnvSetup) -> RolloutSpec:
    return RolloutSpec("g0-0", 0, setup, setup.tasks[0], env_seed=1, sampling_seed=2)


def penalty(**orchestrator: Any) -> OverlongPenalty | None:
    return OverlongPenalty.of(make_config(**orchestrator).orchestrator)


def test_the_numbers_of_gsm8k():
    dapo = penalty(overlong={"buffer": 128}, sampling={"max_tokens": 2048})
    assert dapo == OverlongPenalty(2048, 128, 1.0)
    lengths = (1, 1919, 1920, 1921, 1984, 2047, 2048)
    assert [dapo.of_reply(n) for n in lengths] == [0, 0, 0, -1 / 128, -0.5, -127 / 128, -1.0]


def test_it_is_off_unless_its_table_is_there():
    assert penalty() is None


def test_a_limit_of_its_own_goes_on_beyond_it():
    own = penalty(overlong={"buffer": 10, "max_tokens": 20, "factor": 3.0}, sampling={"max_tokens": 256})
    assert own is not None
    assert [own.of_reply(n) for n in (10, 15, 20, 30)] == [0.0, -1.5, -3.0, -6.0]


@given(st.integers(2, 5000), st.data())
def test_it_never_pays_is_nothing_before_the_buffer_and_all_of_the_factor_at_the_limit(limit: int, data: st.DataObject):
    buffer = data.draw(st.integers(1, limit - 1))
    factor = data.draw(st.floats(0.01, 10))
    some = OverlongPenalty(limit, buffer, factor)
    values = [some.of_reply(n) for n in range(1, limit + 1)]
    assert all(value == 0 for value in values[: limit - buffer])
    assert all(before > after for before, after in zip(values[limit - buffer :], values[limit - buffer + 1 :], strict=False))
    assert values[-1] == pytest.approx(-factor)


@pytest.fixture
def strict_player(player: Player) -> Player:
    """Replies of up to 32 tokens; from the 25th on each costs an eighth."""
    return replace(player, overlong=OverlongPenalty(limit=32, buffer=8, factor=1.0))


@pytest.mark.parametrize("mode", ["dense", "sparse"])
async def test_each_reply_pays_at_its_own_turn_under_either_reward_mode(
    strict_player: Player, player: Player, policy_saying: Policy, mode: str
):
    said = policy_saying("a", "b" * 60, "z")  # byte-level tokens: 2, 32 (cut), 2 with the stop token
    rollout = await strict_player.play(spec(echo_setup(reward={"mode": mode})), said)
    plain = await player.play(spec(echo_setup(reward={"mode": mode})), policy_saying("a", "b" * 60, "z"))
    assert [len(turn.sampled_ids) for turn in rollout.turns] == [2, 32, 2]
    assert [turn.components["overlong"] for turn in rollout.turns] == [0.0, -1.0, 0.0]
    paid = [after.reward - before.reward for after, before in zip(rollout.turns, plain.turns, strict=True)]
    assert paid == pytest.approx([0.0, -1.0, 0.0])
    assert (rollout.reward, rollout.reward_dense, rollout.reward_sparse) == pytest.approx(
        (plain.reward - 1, plain.reward_dense - 1, plain.reward_sparse - 1)
    )
    assert rollout.components["overlong"] == -1.0
    assert "overlong" not in plain.components


async def test_credit_by_turns_blames_the_reply_that_was_too_long(strict_player: Player, policy_saying: Policy):
    setup = echo_setup(reward={"mode": "sparse"})
    long = await strict_player.play(spec(setup), policy_saying("a", "b" * 60, "z"))
    short = await strict_player.play(spec(setup), policy_saying("a", "b", "z"))
    of_long, of_short = turn_advantages([[turn.reward for turn in one.turns] for one in (long, short)], valid=[True, True])
    assert of_long.tolist() == pytest.approx([-1.0, -1.0, 0.0])  # what follows a turn counts, what came before does not
    assert of_short.tolist() == pytest.approx([1.0, 1.0, 0.0])


async def gsm8k_rollouts(player: Player, policy_saying: Policy, texts: Sequence[str]) -> list[Rollout]:
    config = EnvConfig(id="gsm8k", name="openai/gsm8k", args={"train": [TASK], "validation": [TASK]})
    (setup,) = load_setups([config], "validation")
    return [await player.play(spec(setup), policy_saying(text)) for text in texts]


async def test_accuracy_is_free_of_it_and_it_is_a_metric_of_its_own(strict_player: Player, policy_saying: Policy):
    rollouts = await gsm8k_rollouts(strict_player, policy_saying, ["#### 2", "so it is plain that #### 2", "no"])
    assert [rollout.sampled_tokens for rollout in rollouts] == [7, 27, 3]
    assert [rollout.reward for rollout in rollouts] == [1.0, 1 - 3 / 8, 0.0]
    held_out = eval_metrics("openai/gsm8k", rollouts)
    assert held_out["val-core/openai/gsm8k/acc/mean"] == pytest.approx(2 / 3)
    assert held_out["val-core/openai/gsm8k/reward/mean"] == pytest.approx((2 - 3 / 8) / 3)
    assert held_out["val-aux/openai/gsm8k/overlong/mean"] == pytest.approx(-1 / 8)
    trained = mean_by_name("reward", (rollout.components for rollout in rollouts), missing=0.0)
    assert trained == pytest.approx({"reward/answer/mean": 2 / 3, "reward/overlong/mean": -1 / 8})


def test_training_and_evaluation_have_the_same_player(tiny_chat: TemplateChat, env_threads: EnvThreads):
    config = RLConfig.model_validate(
        {"orchestrator": {"env": [{"id": ECHO}], "overlong": {"buffer": 16}, "sampling": {"max_tokens": 64}}, "seq_len": 500}
    )
    player = Player.of(config, tiny_chat, env_threads)
    assert (player.seq_len, player.max_tokens, player.overlong) == (500, 64, OverlongPenalty(64, 16, 1.0))


def test_an_environment_with_a_component_of_that_name_is_refused():
    with pytest.raises(ValueError, match="has a reward component 'overlong', the name under which"):
        load_setups([EnvConfig(id=f"{__name__}:Clashing")], "train")
