"""A verifiers environment as one of ours: its loop runs as it is, and waits for our policy where it would call a model."""

from collections.abc import Mapping, Sequence
from typing import Any

from turnwise.adapters.verifiers.backend import Settings, load
from turnwise.adapters.verifiers.exchange import Ask, Exchange, Outcome
from turnwise.adapters.verifiers.loop import LoopThread
from turnwise.envs.base import Step, Task, TextEnv
from turnwise.envs.messages import AssistantMessage

UNLIMITED_TURNS = 1000  # of an environment without a limit: the context, or `orchestrator.env.max_turns`, ends it long before

_LOOPS: dict[int, LoopThread] = {}


class Verifiers(TextEnv):
    """An environment of the library verifiers: `verifiers:PACKAGE`."""

    def __init__(self, *, source: str, adapter: Mapping[str, Any] | None = None, **args: Any) -> None:
        """Load the environment, once a process for the same arguments.

        Args:
            source: the package, as verifiers finds it.
            adapter: what is ours: `Settings`.
            args: arguments of its `load_environment`, or of its taskset.

        Raises:
            ValueError: no known version of verifiers is installed, or the environment cannot be loaded or trained on.
        """
        super().__init__()
        self.source = source
        self.settings = Settings.model_validate(dict(adapter or {}))
        self.backend = load(source, args, self.settings)
        self.tools = self.backend.tools
        self.max_turns = self.backend.max_turns or UNLIMITED_TURNS
        self.component_names = self.outcome_components = self.backend.component_names  # pyright: ignore[reportAttributeAccessIssue]
        self._exchange: Exchange | None = None
        self._asked: Ask | None = None
        self._metrics: dict[str, float] = {}

    def tasks(self, split: str) -> Sequence[Task]:
        """The environment's own tasks: see `docs/adapters.md` for which are held out.

        Raises:
            ValueError: there are none in this split.
        """
        return self.backend.tasks(split)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin the environment's loop. `info["messages"]` is the whole opening conversation, the observation its last text."""
        observation, info = super().reset(seed=seed, options=options)
        return observation, {**info, "messages": self._messages()}

    def begin(self, task: Task) -> str:
        self.close()
        self._metrics = {}
        self._exchange = Exchange(f"verifiers:{self.source}", self.tools)
        self._exchange.start(self._loop().submit(self.backend.play(task, self._exchange)))
        event = self._exchange.wait(self.settings.timeout_s)
        if isinstance(event, Outcome):
            raise RuntimeError(f"verifiers:{self.source} ended task {task.get('id')!r} before it asked for a reply")
        self._asked = event
        return event.messages[-1]["content"]

    def step(self, action: str) -> Step:
        """Hand over the reply, and wait until the loop asks for the next one or ends."""
        if self.over or self._exchange is None:
            raise RuntimeError("Verifiers.step() after the end of an episode (or before the first); call reset()")
        self.turn += 1
        said = AssistantMessage.from_action(action) if self.tools else AssistantMessage(content=action)
        self._exchange.answer(said)
        self._asked = None
        event = self._exchange.wait(self.settings.timeout_s)
        if isinstance(event, Outcome):
            self._metrics = event.metrics
            step = self._step("", event.components, terminated=not event.truncated, truncated=event.truncated)
        else:
            self._asked = event
            step = self.answer("\n\n".join(message["content"] for message in event.messages))
        step[4]["messages"] = self._messages()
        return step

    def closing_components(self) -> dict[str, float]:
        """An episode that is cut off is scored as the environment scores what is there."""
        if self._exchange is None:
            return {}
        self._exchange.cut_off()
        event = self._exchange.wait(self.settings.timeout_s)
        if isinstance(event, Ask):
            self._exchange.cancel()
            raise RuntimeError(f"verifiers:{self.source} asked for a reply after its episode was cut off")
        self._metrics = event.metrics
        return event.components

    def episode_metrics(self) -> dict[str, float]:
        """Those of the environment, which come with its scores: at the end."""
        return dict(self._metrics)

    def close(self) -> None:
        """Drop a rollout that is still under way."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.cancel()

    def _messages(self) -> list[dict[str, Any]]:
        return [] if self._asked is None else [dict(message) for message in self._asked.messages]

    def _loop(self) -> LoopThread:
        """The loop of all rollouts of this environment; another one when something blocks it."""
        key = id(self.backend)
        if key not in _LOOPS or _LOOPS[key].stuck:
            _LOOPS[key] = LoopThread(self.source)
        return _LOOPS[key]
