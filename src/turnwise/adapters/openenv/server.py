"""An environment of ours as an OpenEnv server, made of their own parts: any client of theirs can play it.

Every session has an instance of its own. Importing this module needs the package `openenv`.
"""

from collections.abc import Callable, Mapping
from typing import Any, cast

# not in the environment that the types are checked in
from openenv.core.env_server import create_fastapi_app  # pyright: ignore[reportMissingImports]
from openenv.core.env_server.interfaces import Environment  # pyright: ignore[reportMissingImports]
from openenv.core.env_server.types import (  # pyright: ignore[reportMissingImports]
    Action,
    ConcurrencyConfig,
    EnvironmentMetadata,
    Observation,
    State,
)
from pydantic import Field

from turnwise import __version__
from turnwise.envs.base import MAX_CHARACTERS, Task, TextEnv
from turnwise.envs.messages import AssistantMessage, ToolCall

MakeEnv = Callable[[], TextEnv]
CALL_KEYS = frozenset({"id", "name", "arguments"})


class TextAction(Action):  # pyright: ignore[reportUntypedBaseClass]
    """A reply."""

    text: str = Field(max_length=MAX_CHARACTERS, description="What is replied to the last observation")


class ToolAction(Action):  # pyright: ignore[reportUntypedBaseClass]
    """A reply that may call tools."""

    text: str = Field(default="", max_length=MAX_CHARACTERS, description="What is replied beside the calls")
    tool_calls: list[dict[str, Any]] = Field(
        default_factory=list[dict[str, Any]], description='Calls in order, each {"name": ..., "arguments": {...}}'
    )


class TextObservation(Observation):  # pyright: ignore[reportUntypedBaseClass]
    """What is answered. `metadata` of a reset: `task_id`, `system_prompt`, `examples`, `tools`; of a step: `reward_components`,
    `metrics`, `terminated`, `truncated` and, where there are tools, `messages`."""

    text: str = Field(description="The observation")


class Served(Environment):  # pyright: ignore[reportUntypedBaseClass]
    """One session."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, make_env: MakeEnv, name: str) -> None:
        super().__init__()
        self.make_env, self.name = make_env, name
        self.env: TextEnv | None = None
        self.closed = False
        self._state: Any = State()

    def reset(
        self,
        seed: int | None = None,
        episode_id: str | None = None,
        split: str = "train",
        index: int | None = None,
        **_unknown: Any,
    ) -> TextObservation:
        """Begin the episode of task `index` of `split`, or of a training task drawn by `seed`.

        Raises:
            ValueError: there is no such task.
        """
        env = self._open()
        options = None if index is None else {"task": self._task(split, index)}
        text, _ = env.reset(seed=seed, options=options)
        place = {} if index is None else {"task_id": _task_id(split, index)}
        self._state = State(episode_id=episode_id, step_count=0, **place)
        told = {
            **place,
            "system_prompt": env.system_prompt,
            "examples": [dict(message) for message in env.examples],
            "tools": [tool.spec() for tool in env.tools],
        }
        return TextObservation(text=text, metadata={key: value for key, value in told.items() if value})

    def step(self, action: Any, timeout_s: float | None = None, **_unknown: Any) -> TextObservation:
        """Play a reply; `done` when the episode ended, by its rules or by a limit."""
        env = self._open()
        text, reward, terminated, truncated, info = env.step(_reply(action))
        self._state.step_count += 1
        metadata = {
            "reward_components": info["reward_components"],
            "metrics": info["metrics"],
            "terminated": bool(terminated),
            "truncated": bool(truncated),
            **({"messages": info["messages"]} if "messages" in info else {}),
        }
        return TextObservation(text=text, reward=float(reward), done=bool(terminated or truncated), metadata=metadata)

    @property
    def state(self) -> Any:
        return self._state

    def get_metadata(self) -> Any:
        env = self._open()
        description = (type(env).__doc__ or self.name).strip().partition("\n")[0]
        return EnvironmentMetadata(
            name=self.name, description=description, version=__version__, readme_content=env.system_prompt or None
        )

    def list_splits(self) -> list[str]:
        return [split for split in ("train", "validation") if len(self._open().tasks(split))]

    def num_tasks(self, split: str) -> int:
        return len(self._open().tasks(split))

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Its place alone: the rest of a row, and its id in some data sets, may be the answer."""
        rows = self._open().tasks(split)
        if not 0 <= index < len(rows):
            raise IndexError(index)
        return {"id": _task_id(split, index), "split": split, "index": index}

    def list_tasks(self, split: str) -> list[dict[str, Any]]:
        return self.get_task_range(split)

    def get_task_range(self, split: str, start: int | None = None, stop: int | None = None) -> list[dict[str, Any]]:
        return [self.get_task(split, index) for index in range(*slice(start, stop).indices(self.num_tasks(split)))]

    def close(self) -> None:
        """End the session, as when it was idle for too long: what comes later is refused."""
        env, self.env, self.closed = self.env, None, True
        if env is not None:
            env.close()

    def _open(self) -> TextEnv:
        if self.closed:
            raise RuntimeError("this session has ended, or was idle for too long; connect anew")
        if self.env is None:
            self.env = self.make_env()
        return self.env

    def _task(self, split: str, index: int) -> Task:
        rows = self._open().tasks(split)
        if not 0 <= index < len(rows):
            raise ValueError(f"there is no task {index} in the split {split!r}, which has {len(rows)}")
        return rows[index]


def make_app(make_env: MakeEnv, name: str, *, max_sessions: int, session_timeout_s: float) -> Any:
    """The application: their routes over environments that `make_env` makes.

    Args:
        make_env: a new instance; called from several threads.
        name: of the environment, in their task routes.
        max_sessions: sessions at a time; a further one is refused.
        session_timeout_s: a session that is idle for longer is ended.
    """
    probe = make_env()
    tools = bool(probe.tools)
    probe.close()
    limits = ConcurrencyConfig(max_concurrent_envs=max_sessions, session_timeout=session_timeout_s)
    return create_fastapi_app(
        lambda: Served(make_env, name),
        ToolAction if tools else TextAction,
        TextObservation,
        concurrency_config=limits,
        env_name=name,
        mode="simulation",
    )


def _task_id(split: str, index: int) -> str:
    return f"{split}/{index}"


def _reply(action: Any) -> str:
    """The action of ours that an action of theirs says. Raises ValueError for a call of another form."""
    calls = cast(list[Mapping[str, Any]], getattr(action, "tool_calls", []))
    if not calls:
        return action.text
    for call in calls:
        if not (set(call) <= CALL_KEYS and isinstance(call.get("name"), str) and isinstance(call.get("arguments", {}), dict)):
            raise ValueError(f'tool_calls holds {call!r}, which is not {{"name": text, "arguments": object}}')
    made = tuple(ToolCall(id=str(c.get("id") or ""), name=c["name"], arguments=c.get("arguments", {})) for c in calls)
    return AssistantMessage(content=action.text, tool_calls=made).numbered(()).to_action()
