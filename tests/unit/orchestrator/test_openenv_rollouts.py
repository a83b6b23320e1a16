"""Rollouts over an OpenEnv server: what the server does wrong errs the rollout, and every rollout gives its session back."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from support.openenv_server import BREAK_OFF, HANG, FakeOpenEnv, fake_openenv, observed
from turnwise.config import EnvConfig
from turnwise.orchestrator.environments import EnvSetup, load_setups
from turnwise.orchestrator.rollout import Generate, Player, RolloutSpec
from turnwise.orchestrator.types import StopReason

Policy = Callable[..., Generate]


def _setup(fake: FakeOpenEnv, **args: Any) -> EnvSetup:
    return load_setups([EnvConfig(id=f"openenv:{fake.url}", name="fake", args={"tasks": 4, **args})], "train")[0]


def _spec(setup: EnvSetup, number: int = 0) -> RolloutSpec:
    return RolloutSpec(f"g0-{number}", 0, setup, setup.tasks[number], env_seed=1, sampling_seed=2)


def _wait_until_free(fake: FakeOpenEnv) -> None:
    deadline = time.monotonic() + 10
    while fake.sessions:
        assert time.monotonic() < deadline, "a session was not given back"
        time.sleep(0.005)


async def test_concurrent_rollouts_have_sessions_of_their_own_and_give_them_back(player: Player, policy_saying: Policy):
    most = 0

    def play(kind: str, data: dict[str, Any]) -> object:
        nonlocal most
        most = max(most, fake.sessions)
        return observed(f"seed {data['seed']}") if kind == "reset" else observed("on", 0.25, done=data["message"] == "z")

    with fake_openenv(play) as fake:
        setup = _setup(fake)
        rollouts = await asyncio.gather(*(player.play(_spec(setup, n), policy_saying("ab", "z")) for n in range(4)))
        await asyncio.to_thread(_wait_until_free, fake)
    assert {(one.stop_reason, one.reward) for one in rollouts} == {(StopReason.TERMINATED, 0.5)}
    assert [one.messages[0]["content"] for one in rollouts] == [f"seed {row['seed']}" for row in setup.tasks]
    assert 1 <= most <= 4
    assert [kind for kind, _ in fake.sent].count("reset") == 4


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (BREAK_OFF, "broke the connection off"),
        (observed("on", "much"), "'much', not a number"),
        (observed("x" * 60_000), "an observation of 60000 characters"),
    ],
)
async def test_what_a_server_does_wrong_errs_the_rollout_and_says_what(
    player: Player, policy_saying: Policy, answer: object, said: str
):
    with fake_openenv(lambda kind, _data: observed("go") if kind == "reset" else answer) as fake:
        rollout = await player.play(_spec(_setup(fake)), policy_saying("ab"))
        await asyncio.to_thread(_wait_until_free, fake)
    assert rollout.stop_reason is StopReason.ERROR
    assert said in str(rollout.error)
    assert "step of fake raised, turn 1" in str(rollout.error)


async def test_a_server_that_hangs_errs_the_rollout_and_its_session_is_left(player: Player, policy_saying: Policy):
    with fake_openenv(lambda _kind, _data: HANG) as fake:
        rollout = await player.play(_spec(_setup(fake, timeout_s=0.5)), policy_saying("ab"))
        await asyncio.to_thread(_wait_until_free, fake)
    assert rollout.stop_reason is StopReason.ERROR
    assert "did not answer within args.timeout_s = 0.5" in str(rollout.error)
