"""What the environments need of verifiers, whichever of its two APIs is installed, and which one that is."""

import importlib
import json
import threading
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

from turnwise.adapters.verifiers.exchange import Exchange, Outcome
from turnwise.config.base import Config
from turnwise.envs.base import Task
from turnwise.envs.messages import Tool

BACKENDS = {
    (0, 3): "turnwise.adapters.verifiers.classic:ClassicBackend",
    (0, 4): "turnwise.adapters.verifiers.tasksets:TasksetBackend",
}
INSTALL = "pip install 'turnwise[verifiers]' for 0.4, or pip install 'turnwise[verifiers-legacy]' for 0.3"


class JudgeSettings(Config):
    """The model that scores, where a rubric asks one; every key that is left out is as the environment has it."""

    base_url: str | None = None
    """OpenAI-compatible endpoint."""

    model: str | None = None
    """Its model."""

    api_key_env: str | None = None
    """Environment variable with the key; none is sent when unset."""


class Settings(Config):
    """`args.adapter`: what turnwise itself takes, beside the arguments of the environment."""

    judge: JudgeSettings | None = None
    """Who judges; `{}` takes the judge that the environment itself configures. Unset: an environment with a judge is refused."""

    validation: int | dict[str, Any] | None = None
    """Held-out tasks: so many of the last training tasks or, from 0.4 on, arguments of the taskset that holds them."""

    tasks: int = 1000
    """How many tasks are taken of a taskset without an end."""

    timeout_s: float = 600.0
    """Longest wait for the environment's loop, in seconds, after which the rollout is dropped."""

    env: dict[str, Any] = {}
    """From 0.4 on: keys of the environment's configuration beside its taskset, seats and their harnesses for instance."""


class Backend(Protocol):
    """One environment of verifiers, loaded."""

    tools: tuple[Tool, ...]
    max_turns: int | None  # None: no limit
    component_names: frozenset[str]

    def tasks(self, split: str) -> Sequence[Task]:
        """Rows of a split, each with its "id". Raises ValueError for a split that there is not."""
        ...

    async def play(self, task: Task, exchange: Exchange) -> Outcome:
        """Run the environment's own loop on one task, its model calls answered by `exchange`.

        Raises:
            CutOff: never; a rollout that was cut off is scored.
            Exception: what ended the rollout without a score.
        """
        ...


_LOADED: dict[str, Backend] = {}
_LOCK = threading.Lock()


def load(source: str, args: Mapping[str, Any], settings: Settings) -> Backend:
    """The environment `source`, loaded once a process: instances of one configuration share it, as rollouts do over there.

    Raises:
        ValueError: verifiers is missing or of an unknown version, or the environment cannot be loaded.
    """
    key = json.dumps([source, args, settings.model_dump(mode="json")], sort_keys=True, default=repr)
    with _LOCK:
        if key not in _LOADED:
            module, _, name = backend_target().partition(":")
            _LOADED[key] = getattr(importlib.import_module(module), name)(source, args, settings)
        return _LOADED[key]


def backend_target() -> str:
    """`module:Class` for the installed version of verifiers.

    Raises:
        ValueError: there is none, or it is of no known API.
    """
    try:
        installed = version("verifiers")
    except PackageNotFoundError:
        raise ValueError(f"environments of verifiers need the package: {INSTALL}") from None
    major, minor, patch = (int(part) if part.isdigit() else 0 for part in (*installed.split("."), "0", "0")[:3])
    target = BACKENDS.get((major, minor))
    if target is None or (major, minor, patch) < (0, 3, 1):
        raise ValueError(f"verifiers {installed} has an API that is not known here (0.3.1 to 0.4 are): {INSTALL}")
    return target
