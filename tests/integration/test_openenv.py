"""OpenEnv's own package on the other side: their client against our server, and a server of theirs under our environment."""

import importlib.util
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from turnwise.adapters.openenv.local import Launch, local_url, stop_all
from turnwise.adapters.openenv.wire import OpenEnvError, Session
from turnwise.envs import Done, TextEnv, ToolEnv, make, tool
from turnwise.envs.messages import AssistantMessage, ToolCall

pytestmark = [
    pytest.mark.openenv,
    pytest.mark.skipif(importlib.util.find_spec("openenv") is None, reason="needs turnwise[openenv]"),
]
GAME = Path(__file__).parents[1] / "support" / "openenv_game.py"
WORDLE = {"style": "shortlist", "shortlist": 8, "max_turns": 3}
SERVE = (sys.executable, "-m", "turnwise.cli.turnwise", "serve-env")
START_S = 120.0  # their package takes seconds to import


@pytest.fixture(scope="module")
def wordle() -> Generator[str]:
    arguments = [word for key, value in WORDLE.items() for word in (f"--{key}", str(value))]
    limits = ["--max-sessions", "3", "--session-timeout", "4"]
    yield local_url(Launch((*SERVE, "wordle", "--port", "{port}", *limits, *arguments), start_timeout_s=START_S))
    stop_all()


@pytest.fixture
def game(wordle: str, tmp_path: Path) -> Any:
    """Makes the game as an environment over a server of its own."""
    command = [sys.executable, str(GAME), "{port}"]
    return lambda **args: make(
        "openenv:guess", {"command": command, "log": str(tmp_path / "log"), "start_timeout_s": START_S, "max_turns": 20, **args}
    )


def replies(seed: int) -> list[str]:
    """What a scripted player says: words, some of them known, and nonsense."""
    random = Random(seed)
    return [random.choice(["crane", "slate", "mulch", "zzzzz", "I say stock", "", "two words"]) for _ in range(3)]


def played(env: TextEnv, task: Any, seed: int) -> list[tuple[Any, ...]]:
    """Observation, reward and ends of every step."""
    observation, _ = env.reset(seed=seed, options={"task": task})
    steps: list[tuple[Any, ...]] = [(observation,)]
    for reply in replies(seed):
        *step, info = env.step(reply)
        steps.append((*step, info["reward_components"], info["metrics"]))
        if step[2] or step[3]:
            break
    return steps


def test_fifty_episodes_of_wordle_are_equal_here_and_over_the_wire(wordle: str):
    native = make("wordle", WORDLE)
    parts = {"components": "reward_components", "metrics": "metrics", "system_prompt": native.system_prompt}
    with closing(make(f"openenv:{wordle}", {"tasks": "server", "max_turns": 3, **parts})) as remote:
        assert len(remote.tasks("validation")) == len(native.tasks("validation"))
        for seed in range(50):
            split = ("train", "validation")[seed % 2]
            here = played(native, native.tasks(split)[seed], seed)
            there = played(remote, remote.tasks(split)[seed], seed)
            for step in there[1:]:
                assert step[-1].pop("invalid_actions") == 0.0
            assert here == there


def test_their_client_plays_our_server_and_reads_text_reward_and_components(wordle: str):
    from openenv.core import GenericEnvClient

    native = make("wordle", WORDLE)
    with GenericEnvClient(base_url=wordle).sync() as client:
        begun = client.reset(seed=5, split="validation", index=7)
        assert begun.observation["text"] == native.reset(seed=5, options={"task": native.tasks("validation")[7]})[0]
        assert begun.metadata["system_prompt"] == native.system_prompt
        assert (begun.reward, begun.done, begun.metadata["task_id"]) == (None, False, "validation/7")
        for reply in ("crane", "slate", "mulch"):
            here = native.step(reply)
            there = client.step({"text": reply})
            assert (there.observation["text"], there.reward, there.done) == (here[0], here[1], here[2] or here[3])
            assert there.metadata["reward_components"] == here[4]["reward_components"]
        assert client.state()["step_count"] == 3
        with pytest.raises(RuntimeError, match="call reset"):
            client.step({"text": "more"})


def test_sessions_of_our_server_are_isolated_bounded_and_given_back(wordle: str):
    sessions = [Session(wordle, 5.0) for _ in range(3)]
    begun = [session.reset({"seed": 1, "split": "train", "index": index}) for index, session in enumerate(sessions)]
    assert len({str(one["observation"]["text"]) for one in begun}) == 3
    ended = [[session.step({"text": "crane"})["done"] for _ in range(3)][-1] for session in sessions[:1]]
    assert ended == [True]
    assert sessions[1].step({"text": "crane"})["done"] is False
    with pytest.raises(OpenEnvError, match="no place became free"):
        Session(wordle, 0.3).reset({})
    sessions[0].close()
    late = Session(wordle, 5.0)
    late.reset({})
    for session in (*sessions, late):
        session.close()


def test_an_abandoned_session_of_our_server_ends_and_its_place_is_free(wordle: str):
    left = [Session(wordle, 20.0) for _ in range(3)]
    for session in left:
        session.reset({})
    late = Session(wordle, 20.0)
    late.reset({})  # waits until the idle ones are ended
    with pytest.raises(OpenEnvError, match=r"this session has ended, or was idle for too long"):
        left[0].step({"text": "crane"})
    for session in (*left, late):
        session.close()


def test_a_game_of_theirs_is_played_and_every_fault_of_its_server_is_an_error(game: Any):
    with closing(game()) as env:
        task = env.tasks("train")[3]
        target = Random(task["seed"]).randrange(10)
        assert env.reset(seed=0, options={"task": task})[0] == "A number from 0 to 9."
        text, reward, *_, info = env.step("eleven")
        assert text.startswith("The reply is no action that the environment takes: number: Input should be a valid integer")
        assert (reward, info["metrics"]) == (0.0, {"invalid_actions": 1.0})
        assert env.step(str(target + 1))[:4] == ("lower", 0.0, False, False)
        assert env.step(f" {target}\n")[:4] == ("Yes.", 1.0, True, False)
    with closing(game(observation="{hint} ({tries} so far)")) as env:
        assert env.reset(seed=0)[0] == "A number from 0 to 9. (0 so far)"
    faults = {
        "66": "reward = null, which NaN becomes too; the episode ended without any reward",
        "77": "an observation of 60000 characters, more than args.max_observation_chars = 50000",
        "-1": "Unable to serialize unknown type",  # a validator's ValueError, which openenv 0.10 cannot write as JSON
        "88": "EXECUTION_ERROR: the dice fell off the table",
        "13": "did not answer within args.timeout_s = 1",
        "99": "broke the connection off .*ended with exit code 7",
    }
    for reply, said in faults.items():
        with closing(game(timeout_s=1.0)) as env:
            env.reset(seed=0)
            with pytest.raises(OpenEnvError, match=said):
                env.step(reply)
    with closing(game()) as env, pytest.raises(OpenEnvError, match="ended with exit code 7"):
        env.reset(seed=0)


def test_tools_of_an_mcp_environment_are_offered_and_called(wordle: str):
    command = [sys.executable, str(GAME), "{port}", "sums"]
    args = {"command": command, "start_timeout_s": START_S, "offer_tools": True, "opening": "{metadata[question]}"}
    with closing(make("openenv:sums", args)) as env:
        assert {one.name: sorted(one.parameters["properties"]) for one in env.tools} == {
            "add": ["one", "other"],
            "hand_in": ["number"],
        }
        assert env.reset(seed=0)[0] == "What is 20 + 22?"
        calls = [("add", {"one": 20, "other": 22}), ("add", {"one": "many"}), ("ad", {})]
        text, reward, terminated, _, info = env.step(called(*calls))
        assert text.startswith("42\n\n")
        assert [message["tool_call_id"] for message in info["messages"]] == ["call-0", "call-1", "call-2"]
        assert (reward, terminated, info["metrics"]) == (0.0, False, {"invalid_actions": 2.0})
        *ended, info = env.step(called(("hand_in", {"number": 42}), ("add", {"one": 1, "other": 1})))
        assert ended == ["Thank you.\n\nNot run: the episode is over, or there are too many calls.", 1.0, True, False]


def called(*calls: tuple[str, dict[str, Any]]) -> str:
    made = tuple(ToolCall(id=f"call-{n}", name=name, arguments=arguments) for n, (name, arguments) in enumerate(calls))
    return AssistantMessage(content="", tool_calls=made).to_action()


class Adder(ToolEnv):
    """Add two numbers."""

    component_names = frozenset({"sum"})
    outcome_components = frozenset({"sum"})

    def tasks(self, split: str) -> list[dict[str, Any]]:
        return [{"id": "only"}]

    def begin(self, task: Any) -> str:
        return "What is 2 + 3?"

    @tool
    def add(self, one: int, other: int) -> str:
        """Add."""
        self.earn(sum=1.0)
        return Done(str(one + other))


def test_tools_of_ours_are_told_at_the_reset_and_called_by_an_action_of_theirs():
    from turnwise.adapters.openenv.server import Served, ToolAction

    session = Served(Adder, "adder")
    begun = session.reset(seed=0, split="train", index=0)
    assert [one["function"]["name"] for one in begun.metadata["tools"]] == ["add"]
    ended = session.step(ToolAction(tool_calls=[{"name": "add", "arguments": {"one": 2, "other": 3}}]))
    assert (ended.text, ended.reward, ended.done) == ("5", 1.0, True)
    assert ended.metadata["messages"][0]["name"] == "add"
    session.reset()
    with pytest.raises(ValueError, match="which is not"):
        session.step(ToolAction(tool_calls=[{"tool": "add"}]))
    with pytest.raises(ValueError, match="no task 1 in the split 'train', which has 1"):
        session.reset(split="train", index=1)
