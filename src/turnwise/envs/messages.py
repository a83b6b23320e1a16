"""What a policy says in a turn with tools, as it crosses from tokens to environments: content and calls, as JSON text."""

from collections.abc import Mapping
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


class AssistantMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A reply: what it says and what it calls."""

    content: str
    tool_calls: tuple[ToolCall, ...] = ()

    def to_action(self) -> str:
        """The action that `ToolEnv.step` takes."""
        return _ENCODER.encode(self).decode()

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
