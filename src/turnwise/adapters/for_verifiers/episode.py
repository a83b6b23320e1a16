"""One rollout of theirs in one of our environments: its own instance, what it has earned, and how it ended."""

import json
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from turnwise.adapters.answers import bounded_text
from turnwise.adapters.for_verifiers.off_loop import Hung, off_loop
from turnwise.adapters.for_verifiers.source import Source
from turnwise.envs import Outage, Task, TextEnv
from turnwise.envs.checks import EnvNonsense, Message, StepResult, checked_numbers, checked_reset, checked_step, raised_words
from turnwise.envs.messages import AssistantMessage, ToolCall

CLOSE_TIMEOUT_S = 10.0  # what an environment may take to release its resources

Answer = TypeVar("Answer")
logger = logging.getLogger(__name__)


class EnvFailure(Exception):
    """An environment raised, hung or answered nonsense; the text says where and what."""


class EnvOutage(EnvFailure):
    """What the environment stands on is down: the episode is void, and says nothing about the policy."""


@dataclass(frozen=True)
class Called:
    """A call of a reply as their messages have it."""

    id: str
    name: str
    arguments: str  # as the model wrote them


class Episode:
    """An episode while it is played, with the same bookkeeping as a rollout of ours.

    `stop` is None while it goes on, "terminated" where the task ended, "truncated" where a limit of the environment cut it.
    """

    def __init__(self, source: Source, task: Task, *, seed: int) -> None:
        self.source, self.task, self.seed = source, task, seed
        self.turns = 0
        self.stop: str | None = None
        self.components: dict[str, float] = {}  # summed over the turns
        self.reward = self.reward_dense = self.reward_sparse = 0.0
        self.metrics: dict[str, float] = {}
        self._env: TextEnv | None = None
        self._failed = False
        self._entered = threading.Lock()  # a cancelled rollout closes its environment after the call that is still inside

    async def begin(self) -> list[Message]:
        """Take an instance and reset it.

        Returns:
            The worked examples and the first observation; the system prompt is `source.system_prompt`.

        Raises:
            EnvFailure: of the environment, as in the other methods.
        """
        begun = await self._call("reset", self._reset, self.source.reset_timeout_s)
        observation = self._check(lambda: bounded_text(checked_reset(begun), what="the observation"))
        return [*self.source.examples, {"role": "user", "content": observation}]

    async def reply(self, content: str, calls: Sequence[Called] = ()) -> tuple[list[Message], float]:
        """Play a reply.

        Returns:
            What answers it (one message of the user, or one of a tool for each call), and the reward it earned.
        """
        said = _message(content, calls if self.source.tools else ())
        action = said.to_action() if self.source.tools else content
        answer = await self._call("step", lambda: self._open.step(action), self.source.timeout_s)
        self.turns += 1
        result = self._check(partial(self._checked, answer, said.tool_calls if self.source.tools else None))
        self.metrics = result.metrics
        reward = self._pay(result.components)
        if result.terminated or result.truncated:
            self.stop = "terminated" if result.terminated else "truncated"
        originals = iter(calls)
        messages = [
            {**message, "tool_call_id": next(originals).id} if message["role"] == "tool" else message
            for message in result.messages
        ]
        return messages, reward

    async def finish(self, reason: str) -> float:
        """End an episode that something outside cut off; the environment still says what is owed. Returns its reward."""
        if not self.turns:
            raise EnvFailure(f"{self.source.env_id}: cut off by {reason} before the first reply; leave more room for the task")
        ended = await self._call(
            "finish", lambda: (self._open.finish(reason), self._open.episode_metrics()), self.source.timeout_s
        )
        owed, metrics = cast(tuple[object, object], ended)
        components = self._check(lambda: checked_numbers(owed, "finish()", self.source.component_names))
        self.metrics = self._check(lambda: checked_numbers(metrics, "metrics"))
        return self._pay(components)

    async def close(self) -> None:
        """Part from the environment: one that served well is used again, others are closed on their own time."""
        env, self._env = self._env, None
        if env is None or (not self._failed and self.source.give_back(env)):
            return
        if type(env).close is TextEnv.close:
            return
        closing = partial(self._alone, partial(self._closed, env))
        if self._entered.locked():  # a cancelled call is still inside: nobody waits for it
            threading.Thread(target=closing, name="turnwise-env-close", daemon=True).start()
            return
        try:
            await off_loop(closing, timeout_s=CLOSE_TIMEOUT_S)
        except Hung as error:
            logger.warning("closing %s: %s", self.source.env_id, error)

    def _closed(self, env: TextEnv) -> None:
        try:
            env.close()
        except Exception as error:  # the episode is scored; what its environment leaves behind is worth a warning
            logger.warning("closing %s failed: %s: %s", self.source.env_id, type(error).__name__, error)

    @property
    def _open(self) -> TextEnv:
        assert self._env is not None, "step before reset"
        return self._env

    def _reset(self) -> object:
        self._env = self.source.take()
        return self._env.reset(seed=self.seed, options={"task": self.task})

    def _checked(self, answer: object, calls: Sequence[ToolCall] | None) -> StepResult:
        result = checked_step(answer, self.source.component_names, calls)
        for message in result.messages:
            bounded_text(message["content"], what="the observation")
        return result

    def _pay(self, components: dict[str, float]) -> float:
        totals = self.source.totals(components)
        if not all(math.isfinite(total) for total in totals):
            self._failed = True
            raise EnvFailure(f"{self.source.env_id}, turn {self.turns}: the reward of {components} is not finite")
        for name, value in components.items():
            self.components[name] = self.components.get(name, 0.0) + value
        reward, dense, sparse = totals
        self.reward += reward
        self.reward_dense += dense
        self.reward_sparse += sparse
        return reward

    def _alone(self, function: Callable[[], object]) -> object:
        with self._entered:
            return function()

    async def _call(self, what: str, function: Callable[[], object], timeout_s: float) -> object:
        try:
            self._failed, before = True, self._failed  # until it has answered; a cancelled call never does
            answer = await off_loop(partial(self._alone, function), timeout_s=timeout_s)
        except Hung as error:
            self._env = None  # its thread may still be inside
            raise EnvFailure(f"{what} of {self.source.env_id} hung, turn {self.turns}: {error} (timeout_s)") from error
        except Outage as error:
            raise EnvOutage(f"{what} of {self.source.env_id}, turn {self.turns}: {error}") from error
        except Exception as error:
            raise EnvFailure(f"{what} of {self.source.env_id} raised, turn {self.turns}: {raised_words(error)}") from error
        self._failed = before
        return answer

    def _check(self, check: Callable[[], Answer]) -> Answer:
        try:
            return check()
        except (EnvNonsense, ValueError) as error:
            self._failed = True
            raise EnvFailure(f"{self.source.env_id}, turn {self.turns}: {error}") from error


def _message(content: str, calls: Sequence[Called]) -> AssistantMessage:
    """A reply as our environments read it, its calls under ids that no two share."""
    return AssistantMessage(content=content, tool_calls=tuple(_call_of(call) for call in calls)).numbered(())


def _call_of(call: Called) -> ToolCall:
    error, arguments = None, None
    try:
        arguments = json.loads(call.arguments or "{}")
    except (ValueError, RecursionError) as wrong:
        error = f"the arguments cannot be read as JSON ({wrong})"
    else:
        if not isinstance(arguments, dict):
            error = f"the arguments must be a JSON object, not {type(arguments).__name__}"
    if error is not None:
        return ToolCall(id=call.id, name=call.name or None, raw=call.arguments, error=error)
    return ToolCall(id=call.id, name=call.name or None, arguments=cast(dict[str, Any], arguments), raw=call.arguments)


def openai_messages(messages: Sequence[Message]) -> list[Message]:
    """Messages as the OpenAI API takes them: the arguments of calls as JSON text, and no keys that it does not know."""
    return [_openai_message(message) for message in messages]


def _openai_message(message: Message) -> Message:
    kept = {key: message[key] for key in ("role", "content", "tool_call_id", "name") if key in message}
    if message.get("tool_calls"):
        kept["tool_calls"] = [_openai_call(call) for call in message["tool_calls"]]
    return kept


def _openai_call(call: Message) -> Message:
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": text}}
