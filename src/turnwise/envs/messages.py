"""What a policy says in a turn with tools, as it crosses from tokens to environments: content and calls, as JSON text."""

from collections.abc import Collection, Mapping
from typing import Any

import msgspec


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """A function that replies may call."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON schema of the arguments, `{"type": "object", "properties": …}`."""

    def spec(self) -> dict[str, Any]:
        """As chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One call that a reply attempts, well-formed or not."""

    id: str
    name: str | None = None
    arguments: dict[str, Any] | None = None
    """None where they could not be read; `raw` and `error` then say what was written and what is wrong with it."""

    raw: str = ""
    """The call as it was sampled."""

    error: str | None = None
    """Why the call cannot be run as it stands, in words for the policy."""

    def spec(self) -> dict[str, Any]:
        """As chat templates and trajectories take it; a call that cannot be run keeps what was written and why."""
        function = {"name": self.name or "", "arguments": self.arguments if self.arguments is not None else {}}
        trouble = {"raw": self.raw, "error": self.error} if self.error is not None else {}
        return {"id": self.id, "type": "function", "function": function, **trouble}


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A reply: what it says and what it calls."""

    content: str
    """What it says beside its calls."""

    tool_calls: tuple[ToolCall, ...] = ()
    thoughts: str = ""
    """What it thought before, where the model's format tells thoughts from content. Not part of the action."""

    raw: str = ""
    """The whole reply as it was sampled, where `content` is not all of it. Not part of the action."""

    def to_action(self) -> str:
        """The action that `ToolEnv.step` takes."""
        return _ENCODER.encode(AssistantMessage(content=self.content, tool_calls=self.tool_calls)).decode()

    def to_message(self) -> dict[str, Any]:
        """As chats and trajectories take it: `role`, `content`; where there are any, `tool_calls`, `reasoning_content`, `raw`."""
        calls = [call.spec() for call in self.tool_calls]
        more = {"tool_calls": calls, "reasoning_content": self.thoughts, "raw": self.raw}
        return {"role": "assistant", "content": self.content, **{key: value for key, value in more.items() if value}}

    def numbered(self, taken: Collection[str]) -> "AssistantMessage":
        """The reply with ids for its calls that are none of `taken`; an id that a call brings is kept where it is free.

        New ids are `call00000` and so on: nine letters and digits, which is what Mistral's templates insist on.
        """
        if not self.tool_calls:
            return self
        used, number, calls = set(taken), len(taken), list[ToolCall]()
        for call in self.tool_calls:
            chosen = call.id
            while not chosen or chosen in used:
                chosen, number = f"call{number:05d}", number + 1
            used.add(chosen)
            calls.append(msgspec.structs.replace(call, id=chosen))
        return msgspec.structs.replace(self, tool_calls=tuple(calls))

    @classmethod
    def from_action(cls, action: str) -> "AssistantMessage":
        """Read an action; text that is not the JSON of a message is content without calls."""
        try:
            return _DECODER.decode(action)
        except (msgspec.DecodeError, UnicodeEncodeError):
            return cls(content=action)


def tool_message(call: ToolCall, content: str) -> Mapping[str, Any]:
    """The answer to a call, as chat templates take it."""
    return {"role": "tool", "tool_call_id": call.id, "name": call.name or "", "content": content}


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(AssistantMessage)
