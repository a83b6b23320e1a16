"""Tools for models whose chat template knows none: described in the system prompt, called and answered as in docs/tools.md."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from turnwise.orchestrator.tool_formats import CallFormat, JsonCalls
from turnwise.orchestrator.types import Message

FORMAT = JsonCalls()

INSTRUCTIONS = """# Tools

These functions are at your disposal, one JSON schema a line:
<tools>
{schemas}
</tools>

To call one, write its name and its arguments as a JSON object between these marks:
<tool_call>
{{"name": "the function", "arguments": {{"an argument": "its value"}}}}
</tool_call>
A reply may hold several calls. Their results come with the next message, in the same order, each between <tool_response> and \
</tool_response>."""


def described(messages: Sequence[Message], specs: Sequence[Mapping[str, Any]], *, system_role: bool) -> list[Message]:
    """A conversation with tools for a template without any.

    Args:
        specs: as `Tool.spec` gives them; none to leave out the description.
        system_role: whether the template takes system messages; the first user message carries the description otherwise.
    """
    told = _with_answers_as_user([as_said(message) for message in messages])
    if not specs:
        return told
    instructions = INSTRUCTIONS.format(schemas="\n".join(json.dumps(spec["function"], ensure_ascii=False) for spec in specs))
    head, *rest = told
    if head["role"] == "system":
        return [{"role": "system", "content": f"{head['content']}\n\n{instructions}"}, *rest]
    if system_role:
        return [{"role": "system", "content": instructions}, *told]
    return [{"role": head["role"], "content": f"{instructions}\n\n{head['content']}"}, *rest]


def as_said(message: Message, written: CallFormat = FORMAT) -> Message:
    """A reply as the text that was sampled, calls and all, or as `written` has it; other messages as they are."""
    if "raw" not in message and "tool_calls" not in message:
        return message
    return {"role": message["role"], "content": message.get("raw") or _spelled(message, written)}


def _spelled(message: Message, written: CallFormat) -> str:
    calls = [call.get("raw") or written.write(call["function"]) for call in message["tool_calls"]]
    return "\n".join(filter(None, [message["content"], *calls]))


def _with_answers_as_user(messages: Sequence[Message]) -> list[Message]:
    """Tool messages, and user messages right after them, as one user message: many templates want turns to alternate."""
    told: list[Message] = []
    answering = False
    for message in messages:
        is_answer = message["role"] == "tool"
        text = f"<tool_response>\n{message['content']}\n</tool_response>" if is_answer else message["content"]
        if answering and message["role"] in ("tool", "user"):
            told[-1] = {"role": "user", "content": f"{told[-1]['content']}\n{text}"}
            continue
        told.append({"role": "user", "content": text} if is_answer else message)
        answering = is_answer
    return told
