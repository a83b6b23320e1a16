"""One rollout of somebody else's loop, met halfway: it asks for replies where it would call a model, and we answer.

Their loop is a coroutine on an event loop of another thread; ours is `reset` and `step`. Every request passes through here,
so that what the loop shows the policy is seen to grow at the end only: then the tokens of the conversation are sampled once
and never encoded again.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from turnwise.adapters.answers import bounded_text
from turnwise.envs.messages import AssistantMessage, Tool

Message = Mapping[str, Any]
SHOWN = 80  # characters of a message in an error


class Unsupported(RuntimeError):
    """The loop asks for something that rollouts of one growing conversation cannot give."""


class CutOff(Exception):
    """The episode was ended from outside while the loop waited for a reply: it should stop, and score what is there."""


@dataclass(frozen=True)
class Ask:
    """The loop wants a reply to these messages: the opening conversation at first, then what is new."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Tool, ...]


@dataclass(frozen=True)
class Outcome:
    """The loop came to its end and was scored."""

    components: dict[str, float]  # weighted: their sum is the reward
    metrics: dict[str, float]
    truncated: bool = False


@dataclass
class Exchange:
    """The two ends of one rollout. `reply` belongs to the loop's thread, everything else to ours."""

    name: str  # of the environment, for messages
    tools: tuple[Tool, ...] | None = None  # what every request must offer; None: whatever the first one does
    events: SimpleQueue[Ask | Outcome | BaseException] = field(default_factory=SimpleQueue[Ask | Outcome | BaseException])
    failure: BaseException | None = None  # of ours, which the loop may have caught
    cut: bool = False
    _loop: asyncio.AbstractEventLoop | None = None
    _waiting: "asyncio.Future[AssistantMessage] | None" = None
    _conversation: str | None = None
    _history: list[Message] = field(default_factory=list[Message])
    _task: "Future[Any] | None" = None

    async def reply(self, messages: Sequence[Message], tools: Sequence[Tool], *, conversation: str = "") -> AssistantMessage:
        """The policy's reply to a conversation.

        Args:
            messages: all of it, as plain dicts of role, content, `tool_calls` (id, name, arguments as JSON text) and
                `tool_call_id`.
            tools: on offer.
            conversation: tells conversations of one rollout apart, where there may be several.

        Raises:
            Unsupported: for a second conversation, a request beside another, a rewritten history, other tools.
            CutOff: the episode ended from outside.
        """
        if self.cut:
            raise CutOff(f"{self.name}: the episode was cut off")
        try:
            new = self._checked(messages, tools, conversation)
        except (Unsupported, ValueError) as error:
            self.failure = error
            raise
        self._loop = asyncio.get_running_loop()
        self._waiting = self._loop.create_future()
        self.events.put(Ask(new, tuple(tools)))
        try:
            said = await self._waiting
        finally:
            self._waiting = None
        self._history = [*self._history, *new, plain_reply(said)]
        return said

    def start(self, task: "Future[Any]") -> None:
        """Watch the loop: what it returns or raises is the last event."""
        self._task = task
        task.add_done_callback(self._ended)

    def wait(self, timeout_s: float) -> Ask | Outcome:
        """What the loop does next.

        Args:
            timeout_s: the longest wait, seconds.

        Raises:
            TimeoutError: it did nothing.
            Exception: whatever ended the loop, ours first.
        """
        try:
            event = self.events.get(timeout=timeout_s)
        except Empty:
            self.cancel()
            raise TimeoutError(f"{self.name} neither asked for a reply nor ended within {timeout_s:g} s") from None
        if self.failure is not None and not isinstance(event, Ask):  # whatever the loop made of it
            raise self.failure
        if isinstance(event, BaseException):
            raise event
        return event

    def answer(self, said: AssistantMessage) -> None:
        """Hand over the reply that the loop waits for. Raises what has gone wrong since it asked."""
        if self.failure is not None:
            self.cancel()
            raise self.failure
        self._resolve(lambda waiting: waiting.set_result(said))

    def cut_off(self) -> None:
        """End the loop from outside, so that it scores what is there."""
        self.cut = True
        self._resolve(lambda waiting: waiting.set_exception(CutOff(f"{self.name}: the episode was cut off")))

    def cancel(self) -> None:
        """Drop the rollout, whatever it does; nothing where it has ended."""
        if self._task is not None:
            self._task.cancel()

    def _resolve(self, action: Any) -> None:
        loop, waiting = self._loop, self._waiting
        if loop is None or waiting is None:
            raise RuntimeError(f"{self.name} does not wait for a reply")
        loop.call_soon_threadsafe(lambda: None if waiting.done() else action(waiting))

    def _ended(self, task: "Future[Any]") -> None:
        if task.cancelled():
            self.events.put(RuntimeError(f"{self.name}: the rollout was cancelled"))
            return
        error = task.exception()
        self.events.put(task.result() if error is None else error)

    def _checked(self, messages: Sequence[Message], tools: Sequence[Tool], conversation: str) -> tuple[dict[str, Any], ...]:
        if self._waiting is not None:
            raise Unsupported(
                f"{self.name} asks for a reply while another is being sampled; a rollout is one conversation, and parallel "
                "completions cannot be trained on"
            )
        if self._conversation not in (None, conversation):
            raise Unsupported(
                f"{self.name} begins a second conversation with the policy in one episode; a rollout is one conversation"
            )
        self._conversation = conversation
        if self.tools is not None and {tool.name for tool in tools} != {tool.name for tool in self.tools}:
            offered, declared = (", ".join(sorted(tool.name for tool in some)) or "none" for some in (tools, self.tools))
            raise Unsupported(f"{self.name} offers the tools {offered}; the environment was loaded with {declared}")
        known = len(self._history)
        for index, (was, now) in enumerate(zip(self._history, messages, strict=False)):
            if not _same(was, now):
                raise Unsupported(
                    f"{self.name} rewrites its history: message {index} was {_shown(was)} and is now {_shown(now)}; "
                    "sampled tokens can only be trained on where the conversation grows at the end"
                )
        if len(messages) <= known:
            raise Unsupported(f"{self.name} asks again with {len(messages)} messages after {known}; it must add at least one")
        return tuple(self._plain(message) for message in messages[known:])

    def _plain(self, message: Message) -> dict[str, Any]:
        """A message as our conversations take it; replies of the policy are never among these after the opening."""
        role = str(message.get("role"))
        content = bounded_text(message.get("content") or "", what=f"{self.name}: content of a message of the {role}")
        if role == "tool":
            name = next((call["name"] for call in _calls(self._history) if call["id"] == message.get("tool_call_id")), "")
            return {"role": "tool", "tool_call_id": str(message.get("tool_call_id")), "name": name, "content": content}
        if self._history and role != "user":
            raise Unsupported(
                f"{self.name} answers a reply with a message of the {role}; after the opening only users and tools speak"
            )
        calls = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": json.loads(call["arguments"])}}
            for call in message.get("tool_calls") or ()
        ]
        return {"role": role, "content": content, **({"tool_calls": calls} if calls else {})}


def plain_reply(said: AssistantMessage) -> dict[str, Any]:
    """A reply as loops of others take it: arguments as JSON text, and as they were written where they could not be read."""
    calls = [
        {
            "id": call.id,
            "name": call.name or "",
            "arguments": call.raw if call.arguments is None else json.dumps(call.arguments),
        }
        for call in said.tool_calls
    ]
    return {"role": "assistant", "content": said.content, "tool_calls": calls}


def _calls(history: Sequence[Message]) -> list[Mapping[str, Any]]:
    """Calls of the conversation, the latest first."""
    return [call for message in reversed(history) for call in message.get("tool_calls") or ()]


def _same(was: Message, now: Message) -> bool:
    if was.get("role") != now.get("role") or (was.get("content") or "") != (now.get("content") or ""):
        return False
    if was.get("role") == "tool":
        return was.get("tool_call_id") == now.get("tool_call_id")
    return [_call_key(call) for call in was.get("tool_calls") or ()] == [_call_key(call) for call in now.get("tool_calls") or ()]


def _call_key(call: Mapping[str, Any]) -> tuple[object, ...]:
    """A call without the spelling of its arguments."""
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return (call.get("id"), function.get("name"), arguments)
    return (call.get("id"), function.get("name"), json.dumps(arguments, sort_keys=True))


def _shown(message: Message) -> str:
    text = f"{message.get('role')}: {message.get('content')}"
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}...")
