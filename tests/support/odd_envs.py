"""Environments that run, and each break one thing that their contract says beyond types."""

import itertools
from collections.abc import Sequence
from typing import Any

from support.rollouts import Echo
from turnwise.envs.base import Step, Task
from turnwise.envs.tool_env import ToolEnv
from turnwise.envs.tools import tool

counter = itertools.count()


class Forgetful(Echo):
    """Begins differently each time."""

    def begin(self, task: Task) -> str:
        return f"task {task['id']}, {next(counter)}"


class Unpaid(Echo):
    """Returns a reward that stands in no component."""

    def step(self, action: str) -> Step:
        observation, _, terminated, truncated, info = super().step(action)
        return observation, 1.0, terminated, truncated, {**info, "reward_components": {}}


class PaysTwice(Echo):
    """Pays at every finish."""

    def finish(self, reason: str) -> dict[str, float]:
        return {"owed": -0.25}


class Twins(Echo):
    """Two tasks under one id."""

    def tasks(self, split: str) -> Sequence[Task]:
        return [{"id": f"{split}-0"}, {"id": f"{split}-0"}]


class Peeking(Echo):
    """Trains on what is held out."""

    def tasks(self, split: str) -> Sequence[Task]:
        return [{"id": "the-only-one"}]


class NothingHeldOut(Echo):
    """Has no validation tasks."""

    def tasks(self, split: str) -> Sequence[Task]:
        return super().tasks(split) if split == "train" else []


class FearsLength(Echo):
    """Breaks on long replies."""

    def step(self, action: str) -> Step:
        if len(action) > 10_000:
            raise MemoryError("too long")
        return super().step(action)


class Library(ToolEnv):
    """Looks things up."""

    component_names = frozenset({"win"})
    max_turns = 4

    def tasks(self, split: str) -> Sequence[Task]:
        return [{"id": f"{split}-{i}"} for i in range(3)]

    def begin(self, task: Task) -> str:
        return "Which book?"

    @tool
    def search(self, query: str, k: int = 5) -> str:
        """Search the shelves.

        Args:
            query: what to look for
            k: how many books
        """
        return f"{k} books about {query}"


class BreaksOnBadCalls(Library):
    """Expects every call to be well-formed."""

    def act(self, message: Any) -> Step:
        return self.respond(message, [str(call.arguments["query"]) for call in message.tool_calls] or ["nothing"])


class Boxed(Echo):
    """Works in containers."""

    uses_containers = True

    def begin(self, task: Task) -> str:
        assert self.containers is not None
        return super().begin(task)
