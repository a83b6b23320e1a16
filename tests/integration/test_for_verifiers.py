"""Our environments played from verifiers, whichever of its two APIs is installed, beside our own rollouts of the same replies."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from support.faulty_envs import Faulty, release
from support.musique_rows import bridge_row, river_row, unanswerable_row
from support.scripted_chat import (
    BREAK,
    OVERFLOW,
    ChatServer,
    Said,
    Scripted,
    engine_of,
    gsm8k_script,
    musique_script,
    wordle_script,
)
from turnwise.config import EnvConfig, RewardConfig
from turnwise.envs import make
from turnwise.orchestrator.chat import TemplateChat, load_chat
from turnwise.orchestrator.env_threads import EnvThreads
from turnwise.orchestrator.environments import load_setups
from turnwise.orchestrator.rollout import Player, RolloutSpec
from turnwise.orchestrator.types import Rollout

pytest.importorskip("verifiers")

from turnwise.adapters.for_verifiers import api, load_environment  # after the check that it can be

pytestmark = [
    pytest.mark.verifiers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning"),
]

EPISODES, AT_ONCE = 200, 16


@dataclass(frozen=True)
class Outcome:
    """What either framework says of an episode."""

    reward: float
    dense: float
    sparse: float
    components: Mapping[str, float]
    metrics: Mapping[str, float]
    turns: int
    stop: str | None
    truncated: bool
    error: str | None
    messages: Sequence[Mapping[str, Any]]


async def play_legacy(env: Any, url: str, numbers: Sequence[tuple[int, int]]) -> list[Outcome]:
    """Play (task, script) pairs by the older API."""
    from verifiers.types import ClientConfig

    rows, share = env.get_dataset(), asyncio.Semaphore(AT_ONCE)
    from verifiers.clients import resolve_client

    client = resolve_client(ClientConfig(api_base_url=url, api_key_var="NO_KEY", max_retries=0))

    async def one(task: int, script: int) -> Outcome:
        async with share:
            row = dict(rows[task])
            state = await env._run_rollout_state(row, client, f"script-{script}", {"temperature": 1.0})
        metrics = {name.removeprefix("metric_"): value for name, value in state["metrics"].items() if name.startswith("metric_")}
        components = {
            name.removeprefix("reward_"): value
            for name, value in state["metrics"].items()
            if name.startswith("reward_") and name not in ("reward_dense", "reward_sparse")
        }
        return Outcome(
            state["reward"],
            state["metrics"].get("reward_dense", 0.0),
            state["metrics"].get("reward_sparse", 0.0),
            components,
            metrics,
            len(state["trajectory"]),
            state["stop_condition"],
            state["is_truncated"],
            None if state["error"] is None else f"{type(state['error']).__name__}: {state['error']}",
            [message.model_dump(exclude_none=True) for message in [*state["prompt"], *state["completion"]]],
        )

    return await asyncio.gather(*(one(*pair) for pair in numbers))


async def play_v1(env: Any, url: str, numbers: Sequence[tuple[int, int]]) -> list[Outcome]:
    """Play (task, script) pairs by the newer API."""
    import verifiers.v1 as vf
    from verifiers.v1.clients import ModelContext

    tasks, share = list(env.taskset), asyncio.Semaphore(AT_ONCE)
    client = vf.EvalClientConfig(base_url=url, api_key_var="NO_KEY")

    async def one(task: int, script: int) -> Outcome:
        async with share:
            context = ModelContext(model=f"script-{script}", client=client, sampling=vf.SamplingConfig(temperature=1.0))
            episode = await env.run_episode(tasks[task], context)
        if not episode.traces:
            error = episode.errors[-1]
            return Outcome(0.0, 0.0, 0.0, {}, {}, 0, None, False, f"{error.type}: {error.message}", [])
        (trace,) = episode.traces
        both = {name: trace.metrics.pop(name, 0.0) for name in ("reward_dense", "reward_sparse")}
        return Outcome(
            trace.reward,
            both["reward_dense"],
            both["reward_sparse"],
            {name: reward.score for name, reward in trace.rewards.items() if reward is not None},
            dict(trace.metrics),
            trace.num_turns,
            trace.stop_condition,
            trace.is_truncated,
            None if trace.ok else f"{trace.last_error.type}: {trace.last_error.message}",
            [message.model_dump(exclude_none=True) for message in trace.messages],
        )

    async with env.serving():
        return await asyncio.gather(*(one(*pair) for pair in numbers))


async def play_there(env: Any, scripts: Sequence[Sequence[Said]], tasks: Sequence[int]) -> list[Outcome]:
    async with ChatServer(scripts) as server:
        play = play_legacy if api() == "legacy" else play_v1
        return await play(env, server.url, list(zip(tasks, range(len(scripts)), strict=True)))


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> TemplateChat:
    chat = load_chat(str(tiny_model))
    assert isinstance(chat, TemplateChat)
    return chat


async def play_here(
    chat: TemplateChat, config: EnvConfig, scripts: Sequence[Sequence[Said]], tasks: Sequence[int], seeds: Sequence[int]
) -> list[Rollout]:
    (setup,) = load_setups([config], "train")
    threads = EnvThreads()
    player = Player(chat, threads, seq_len=1 << 20, max_tokens=1 << 16)
    rollouts = [
        await player.play(RolloutSpec(f"g{i}-0", i, setup, setup.tasks[task], seed, 0), engine_of(chat, script))
        for i, (task, seed, script) in enumerate(zip(tasks, seeds, scripts, strict=True))
    ]
    threads.close()
    return rollouts


def gsm8k_rows() -> list[dict[str, Any]]:
    return [{"question": f"What is {i} and {i}?", "answer": f"Twice.\n#### {2 * i:,}"} for i in range(0, 3000, 300)]


MUSIQUE = {"train": [bridge_row(), river_row(), unanswerable_row(id="none")], "validation": [river_row()]}
GAMES: dict[str, tuple[dict[str, Any], Scripted, int | None]] = {
    "wordle": ({"style": "shortlist", "shortlist": 4}, wordle_script, None),
    "gsm8k": ({"train": gsm8k_rows(), "validation": gsm8k_rows(), "format_reward": 0.2}, gsm8k_script, None),
    "musique": (MUSIQUE, musique_script, 5),
}
WEIGHTS = {"wordle": {"format": 0.5, "win": 2.0}, "gsm8k": {"format": 3.0}, "musique": {"citation": 0.5}}


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", GAMES)
async def test_rewards_are_equal_here_and_there_over_two_hundred_episodes(chat: TemplateChat, name: str, mode: Any):
    args, script, max_turns = GAMES[name]
    reward = RewardConfig(mode=mode, weights=WEIGHTS[name])
    env = load_environment(name, reward=mode, weights=WEIGHTS[name], seed=7, max_turns=max_turns, **args)
    source = env.source if api() == "legacy" else env.taskset.source
    rows = make(name, args).tasks("train")
    tasks = [number % len(rows) for number in range(EPISODES)]
    scripts = [script(rows[task], number) for number, task in enumerate(tasks)]
    seeds = [source.seed_of("train", str(rows[task]["id"])) for task in tasks]
    ours = await play_here(chat, EnvConfig(id=name, args=args, reward=reward, max_turns=max_turns), scripts, tasks, seeds)
    theirs = await play_there(env, scripts, tasks)
    assert {rollout.error for rollout in ours} == {outcome.error for outcome in theirs} == {None}
    for rollout, outcome in zip(ours, theirs, strict=True):
        assert outcome.turns == len(rollout.turns)
        assert [outcome.reward, outcome.dense, outcome.sparse] == pytest.approx(
            [rollout.reward, rollout.reward_dense, rollout.reward_sparse], abs=1e-12
        )
        earned = {component: value for component, value in outcome.components.items() if value}
        assert earned == pytest.approx({component: value for component, value in rollout.components.items() if value}, abs=1e-12)
        assert dict(outcome.metrics) == pytest.approx(rollout.metrics)
    assert len({round(outcome.reward, 6) for outcome in theirs}) >= 2  # the scripts are not all alike
    if max_turns:
        cut = [rollout.stop_reason == "max_turns" for rollout in ours]
        assert 10 < sum(cut) < EPISODES - 10
        assert [outcome.truncated for outcome in theirs] == cut


async def test_an_environment_that_went_there_and_back_pays_the_same(chat: TemplateChat):
    """Our Wordle as an environment of verifiers, and that one as ours."""
    rows = make("wordle").tasks("train")
    tasks = list(range(10))
    scripts = [wordle_script(rows[task], number) for number, task in enumerate(tasks)]
    args = {"env": "wordle", "eval_split": "validation"} if api() == "legacy" else {"env": "wordle"}
    straight = await play_here(chat, EnvConfig(id="wordle"), scripts, tasks, [1] * 10)
    back = await play_here(chat, EnvConfig(id="verifiers:turnwise-verifiers", args=args), scripts, tasks, [1] * 10)
    assert {rollout.error for rollout in back} == {None}
    assert [rollout.reward for rollout in back] == pytest.approx([rollout.reward for rollout in straight], abs=1e-9)
    assert [len(rollout.turns) for rollout in back] == [len(rollout.turns) for rollout in straight]


async def test_the_conversation_is_the_same_here_and_there(chat: TemplateChat):
    args = {**MUSIQUE, "shown_examples": 1}
    env = load_environment("musique", **args)
    source = env.source if api() == "legacy" else env.taskset.source
    script = [
        Said("I look.", (("search", '{"query": "bridge"}'), ("search", '{"query": '))),
        Said("Hm."),
        Said("", (("read", '{"paragraph": 1}'),)),
    ]
    script.append(Said("", (("answer", '{"text": "Norway"}'),)))
    seed = source.seed_of("train", "2hop__1_3")
    (ours,) = await play_here(chat, EnvConfig(id="musique", args=args), [script], [0], [seed])
    async with ChatServer([script], given=sum(m["role"] == "assistant" for m in source.examples)) as server:
        play = play_legacy if api() == "legacy" else play_v1
        (theirs,) = await play(env, server.url, [(0, 0)])
        last = server.requests[-1]
    assert [tool["function"]["name"] for tool in last["tools"]] == ["search", "read", "answer"]
    sent = [(message["role"], message.get("content") or "") for message in last["messages"]]
    said = [(message["role"], message["content"]) for message in ours.messages]
    assert [role for role, _ in sent] == [role for role, _ in said][: len(sent)]
    different = [pair for pair in zip(sent, said, strict=False) if pair[0] != pair[1]]
    assert all("JSON" in there[1] and here[0] == "tool" for there, here in different)  # words about a call that is not JSON
    assert len(different) <= 1
    assert theirs.stop == "terminated"


async def test_an_episode_beyond_the_context_is_finished_and_scored():
    env = load_environment("support.rollouts:Echo", turns=5)
    (outcome,) = await play_there(env, [[Said("abcd"), Said(OVERFLOW)]], [0])
    assert (outcome.error, outcome.turns) == (None, 1)
    assert dict(outcome.components) == pytest.approx({"length": 0.04, "win": 0.0, "owed": -0.25})
    assert outcome.reward == pytest.approx(-0.21)
    assert outcome.stop in ("prompt_too_long", "context_full")


async def test_an_environment_that_declares_no_components_pays_its_total():
    env = load_environment("support.scripted_chat:Undeclared", turns=5, max_turns=2)
    (outcome,) = await play_there(env, [[Said("abcd"), Said("ab")]], [0])
    assert (outcome.error, outcome.turns, outcome.truncated) == (None, 2, True)
    assert outcome.reward == pytest.approx(0.04 + 0.02 - 0.25)


FAULTS = [
    ("step", "raise", "step of .* raised, turn 0: ZeroDivisionError: planted"),
    ("reset", "raise", "reset of .* raised, turn 0: ZeroDivisionError: planted"),
    ("finish", "raise", "finish of .* raised, turn 3: ZeroDivisionError: planted"),
    ("step", "exit", "RuntimeError: SystemExit: 3"),
    ("step", "stop_iteration", "RuntimeError: StopIteration"),
    ("step", "hang", "step of .* hung, turn 0: no answer within 0.2 s"),
    ("step", "none", "step returned None"),
    ("step", "nan_reward", "reward nan, not a finite number"),
    ("step", "nan_component", "not a finite number"),
    ("step", "text_component", "not a finite number"),
    ("step", "unknown_component", "unknown name 'bonus'"),
    ("step", "huge", "is not finite"),
    ("step", "bad_metrics", "metrics"),
    ("step", "outage", "no engine answers"),
]


@pytest.mark.parametrize(("where", "what", "words"), FAULTS)
async def test_an_environment_that_fails_makes_an_errored_rollout(where: str, what: str, words: str):
    weights = {"known": 10.0} if what == "huge" else {}
    env = load_environment("support.faulty_envs:Faulty", where=where, what=what, timeout_s=0.2, weights=weights)
    closed = Faulty.closed
    release.clear()
    (outcome,) = await play_there(env, [[Said("a")]], [0])
    assert outcome.error is not None
    assert re.search(words, outcome.error), outcome.error
    kind = {("legacy", True): "InfraError", ("v1", True): "SandboxError"}.get((api(), what == "outage"))
    assert outcome.error.startswith(kind or ("EnvFailed" if api() == "legacy" else "EnvError"))
    assert what == "hang" or Faulty.closed == closed + 1
    release.set()


async def test_an_environment_that_serves_well_after_a_fault_is_a_new_one():
    Faulty.broken = 0
    env = load_environment("support.faulty_envs:Faulty", times=1)
    bad, good = await play_there(env, [[Said("a")]] * 2, [0, 0])
    assert sorted([bad.error is None, good.error is None]) == [False, True]
    assert {0.0, 3.5} >= {(good if bad.error else bad).reward}


async def test_a_failure_of_the_model_is_theirs_to_report():
    env = load_environment("support.rollouts:Echo", turns=5)
    (outcome,) = await play_there(env, [[Said("abcd"), Said(BREAK)]], [0])
    assert outcome.error is not None
    assert outcome.error.startswith("ModelError" if api() == "legacy" else "ProviderError: ")
    assert outcome.components.get("owed", 0.0) == 0.0  # not finished: nothing says that the episode was over


async def test_a_time_limit_of_theirs_ends_the_rollout_and_leaves_the_hanging_environment_alone():
    release.clear()
    env = load_environment("support.faulty_envs:Faulty", what="hang", timeout_s=30)
    if api() == "legacy":
        env.timeout_seconds = 0.5
    else:
        env.config.timeout.episode = 0.5
    closed = Faulty.closed
    (outcome,) = await asyncio.wait_for(play_there(env, [[Said("a")]], [0]), timeout=10)
    assert (outcome.reward, Faulty.closed) == (0.0, closed)
    said = outcome.stop if api() == "legacy" else str(outcome.error)
    assert said == "timeout_reached" or "exceeded its 0.5s deadline" in said
    release.set()


def test_the_plugin_is_found_under_its_id():
    if api() == "legacy":
        import verifiers as vf

        env = vf.load_environment("turnwise-verifiers", env="wordle", num_train=5, split="validation")
        assert len(env.get_dataset()) == 100
        assert env.get_dataset()[0]["prompt"][0]["content"] == env.source.system_prompt
    else:
        import verifiers.v1 as vf

        config = vf.resolve_env_config({"taskset": {"id": "turnwise-verifiers", "env": "wordle", "args": {"num_train": 5}}})
        env = vf.load_environment(config)
        assert type(env).__name__ == "TurnwiseEnv"
        assert len(list(env.taskset)) == 5
        assert len({task.key for task in env.taskset}) == 5
