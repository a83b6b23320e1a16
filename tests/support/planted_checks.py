"""Configurations with one planted fault each, and the check that must be the first to fail for it.

The faults here show without a trainer: an engine without a model, inside the event loop of the checks, plays the rollouts.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from support.rollouts import ECHO, Echo
from support.scripted_engine import ScriptedEngine
from turnwise.config import RLConfig
from turnwise.diagnose.context import Context
from turnwise.diagnose.session import OpenEngines
from turnwise.envs.base import Step
from turnwise.orchestrator import batches, filters, rollout
from turnwise.orchestrator.chat import Chat, TemplateChat
from turnwise.orchestrator.samples import to_samples
from turnwise.orchestrator.types import Rollout
from turnwise.transport import NOT_SAMPLED, Sample

FAULTY = "support.faulty_envs:Faulty"
FLAT = "support.planted_checks:Flat"


def tables(model: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A small run on the echo environment: groups of four, two a batch; `changes` go into `[orchestrator]`."""
    orchestrator = {
        "batch_size": 8,
        "rollouts_per_example": 4,
        "max_error_retries": 0,
        "env": [{"id": ECHO}],
        "sampling": {"max_tokens": 8},
        **changes,
    }
    return {
        "output_dir": str(out / "run"),
        "model": {"name": str(model)},
        "max_steps": 4,
        "seq_len": 512,
        "orchestrator": orchestrator,
        "inference": {"request_timeout_s": 20, "max_retries": 0},
    }


class Flat(Echo):
    """Pays the same for whatever is said."""

    def step(self, action: str) -> Step:
        self.turn += 1
        return self.end("over", components={"win": 0.65})


class ScriptedContext(Context):
    """A context whose engine is a script."""

    def __init__(
        self, config: RLConfig, scratch: Path, *, engine: ScriptedEngine | None = None, rollouts: int | None = 24
    ) -> None:
        super().__init__(config, scratch, lambda text: None, rollouts=rollouts)
        self.engine = engine or ScriptedEngine(require_adapters=False)

    def open_engines(self) -> OpenEngines:
        return _inside_the_loop(self.engine)


@asynccontextmanager
async def _inside_the_loop(engine: ScriptedEngine) -> AsyncGenerator[Sequence[str]]:
    async with engine:
        yield [engine.url]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Args:
        name: as the table of docs/check.md has it.
        check: must be the first to fail.
        plant: breaks the code of a run.
        orchestrator: what the configuration says otherwise, in `[orchestrator]`.
    """

    name: str
    check: str
    plant: Callable[[pytest.MonkeyPatch], None] = field(default=lambda patch: None)
    orchestrator: dict[str, Any] = field(default_factory=dict[str, Any])

    def __str__(self) -> str:
        return self.name


def shift_mask(patch: pytest.MonkeyPatch) -> None:
    """Mask and versions move by one position; everything else stays."""

    def shifted(played: Rollout, advantages: Sequence[float]) -> list[Sample]:
        return [_shifted(sample) for sample in to_samples(played, advantages)]

    patch.setattr(batches, "to_samples", shifted)


def _shifted(sample: Sample) -> Sample:
    mask, versions = (
        [empty, *values[:-1]] for empty, values in ((False, sample.loss_mask), (NOT_SAMPLED, sample.policy_versions))
    )
    return msgspec.structs.replace(sample, loss_mask=mask, policy_versions=versions)


def flip_advantages(patch: pytest.MonkeyPatch) -> None:
    right = filters.group_advantages
    patch.setattr(filters, "group_advantages", lambda *args, **kwargs: -right(*args, **kwargs))


def flip_turn_advantages(patch: pytest.MonkeyPatch) -> None:
    right = filters.turn_advantages
    patch.setattr(filters, "turn_advantages", lambda *args, **kwargs: [-values for values in right(*args, **kwargs)])


def advantages_off_centre(patch: pytest.MonkeyPatch) -> None:
    right = filters.group_advantages
    patch.setattr(filters, "group_advantages", lambda *args, **kwargs: right(*args, **kwargs) + 0.5)


def tokenise_history_again(patch: pytest.MonkeyPatch) -> None:
    """The next prompt is made from the text of the conversation."""
    patch.setattr(TemplateChat, "next_prompt", _from_text)


def tokenise_history_while_playing(patch: pytest.MonkeyPatch) -> None:
    """As above, but only where rollouts are played, so that conversations of the checks' own do not show it."""
    right = rollout.Player.of.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def careless(cls: type[rollout.Player], config: RLConfig, chat: Chat, threads: Any) -> rollout.Player:
        return replace(right(cls, config, chat, threads), chat=_Careless(chat))

    patch.setattr(rollout.Player, "of", classmethod(careless))


class _Careless:
    """A chat that forgets tokens."""

    def __init__(self, chat: Any) -> None:
        self._chat = chat

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chat, name)

    def with_tools(self, tools: Any) -> "_Careless":
        return _Careless(self._chat.with_tools(tools))

    def next_prompt(self, *args: Any) -> list[int]:
        return _from_text(self._chat, *args)


def _from_text(chat: Any, prompt_ids: Any, sampled_ids: Any, history: Any, new: Any) -> list[int]:
    return chat.first_prompt([*history, *new])


def forget_a_component(patch: pytest.MonkeyPatch) -> None:
    """The reward leaves out what the reward table pays."""
    right = rollout.Episode._credit

    def credit(self: Any, components: Any, reward: float, dense: float, sparse: float) -> None:
        right(self, components, reward - components.get("length", 0.0), dense, sparse)

    patch.setattr(rollout.Episode, "_credit", credit)


TEXT_FAULTS = [
    Fault("an end token that the tokenizer lacks", "template", lambda patch: patch.setattr(TemplateChat, "stop_ids", (100_000,))),
    Fault("re-tokenised history", "template", tokenise_history_again),
    Fault(
        "an environment that raises in reset", "environment", orchestrator={"env": [{"id": FAULTY, "args": {"where": "reset"}}]}
    ),
    Fault("an environment that raises in step", "environment", orchestrator={"env": [{"id": FAULTY, "args": {"where": "step"}}]}),
    Fault(
        "a reward that is not a number",
        "environment",
        orchestrator={"env": [{"id": FAULTY, "args": {"what": "nan_component"}}]},
    ),
    Fault("an environment that is not there", "environment", orchestrator={"env": [{"id": "no_such_module:Env"}]}),
    Fault("history re-tokenised while playing", "rollouts", tokenise_history_while_playing),
    Fault("constant reward", "reward", orchestrator={"env": [{"id": FLAT}]}),
    Fault("a component that is not paid", "reward", forget_a_component),
    Fault("advantage sign flipped", "advantages", flip_advantages),
    Fault("advantage sign flipped, per turn", "advantages", flip_turn_advantages, {"advantage": {"per_turn": True}}),
    Fault("advantages off centre", "advantages", advantages_off_centre),
    Fault("mask shifted by one", "mask", shift_mask),
]
