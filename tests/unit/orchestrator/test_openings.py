"""An environment may open its episode with a whole conversation: the record begins with it, and no template is added."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from turnwise.config import EnvConfig
from turnwise.envs.base import Step, Task, TextEnv
from turnwise.envs.checks import EnvNonsense, checked_opening, checked_step
from turnwise.orchestrator.chat import TemplateChat
from turnwise.orchestrator.environments import load_setups
from turnwise.orchestrator.rollout import Generate, Player, RolloutSpec
from turnwise.orchestrator.samples import to_samples

OPENING = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Say 0."},
    {"role": "assistant", "content": "0"},
    {"role": "user", "content": "Say 1."},
]
SHOWN = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]


class Opened(TextEnv):
    """Opens with a conversation of its own, and answers with two messages."""

    system_prompt = "Not this."
    max_turns = 2
    opening: Any = OPENING

    def tasks(self, split: str) -> Sequence[Task]:
        return [{"id": "only"}]

    def begin(self, task: Task) -> str:
        return "not this either"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        observation, info = super().reset(seed=seed, options=options)
        return observation, {**info, "messages": self.opening}

    def step(self, action: str) -> Step:
        self.turn += 1
        step = self.answer("one and two")
        step[4]["messages"] = SHOWN
        return step


def spec() -> RolloutSpec:
    (setup,) = load_setups([EnvConfig(id=f"{__name__}:Opened")], "train")
    return RolloutSpec("g0-0", 0, setup, setup.tasks[0], env_seed=1, sampling_seed=2)


async def test_the_conversation_and_the_answers_are_recorded_as_the_environment_gave_them(
    player: Player, policy_saying: Callable[..., Generate], tiny_chat: TemplateChat
):
    rollout = await player.play(spec(), policy_saying("ab", "cd"))
    assert rollout.error is None
    said = [{"role": "assistant", "content": text} for text in ("ab", "cd")]
    assert [dict(message) for message in rollout.messages] == [*OPENING, said[0], *SHOWN, said[1], *SHOWN]
    assert rollout.turns[0].prompt_ids == tiny_chat.first_prompt(OPENING)
    (sample,) = to_samples(rollout, [1.0, 1.0])
    assert sum(sample.loss_mask) == sum(len(turn.sampled_ids) for turn in rollout.turns)


@pytest.mark.parametrize(
    ("opening", "words"),
    [
        ("hello", "not a list of messages"),
        ([], "not a list of messages"),
        (["hello"], "holds 'hello'"),
        ([{"role": "boss", "content": "go"}], "not a message of one of"),
        ([{"role": "user", "content": None}], "content None, not text"),
        (OPENING[:3], "ends with a reply"),
    ],
)
async def test_an_opening_that_is_no_conversation_is_an_errored_rollout(
    player: Player, policy_saying: Callable[..., Generate], monkeypatch: pytest.MonkeyPatch, opening: Any, words: str
):
    monkeypatch.setattr(Opened, "opening", opening)
    rollout = await player.play(spec(), policy_saying("ab"))
    assert rollout.error is not None
    assert words in rollout.error


def test_an_opening_is_left_out_by_most():
    assert checked_opening(("text", {"messages": None})) is None
    assert checked_opening(("text", None)) is None


def test_without_tools_an_answer_of_a_tool_is_refused():
    info = {"messages": [{"role": "tool", "tool_call_id": "a", "name": "b", "content": "c"}]}
    with pytest.raises(EnvNonsense, match="one tool message a call"):
        checked_step(("text", 0.0, False, False, info), ())
