"""Do calls of tools survive the way from tokens to the environment and back?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turnwise.diagnose.notes import Notes
from turnwise.diagnose.text_checks.reading import Reading
from turnwise.envs.messages import AssistantMessage, Tool, ToolCall, tool_message
from turnwise.orchestrator.described_tools import INSTRUCTIONS
from turnwise.orchestrator.tokenizer import ChatError
from turnwise.orchestrator.types import Message

QUESTION: list[Message] = [{"role": "user", "content": "turnwise asks."}]
REPLY = "turnwise calls twice"  # stands for a reply whose wording does not matter
VALUES: dict[str, Any] = {
    "string": 'a "quoted" text,\nnaïve – 🙂',
    "integer": 3,
    "number": 0.5,
    "boolean": True,
    "array": [],
    "object": {},
}


@dataclass(frozen=True)
class ToolUse:
    """How a model is offered the tools of an environment.

    Args:
        native: by its chat template, and answered by tool messages; in the system prompt and by user messages otherwise.
        several: a reply may make more than one call.
    """

    native: bool
    several: bool

    def words(self) -> str:
        how = "tools go by the chat template" if self.native else "tools are described in the system prompt (docs/tools.md)"
        return f"{how}, {'several calls a reply' if self.several else 'one call a reply: further ones are answered as not run'}"


def judge_tools(reading: Reading, tools: Sequence[Tool], notes: Notes) -> ToolUse | None:
    """Let the template write calls, read them back, and answer them; None where the model cannot be offered the tools."""
    try:
        offering = Reading(reading.chat.with_tools(tools), reading.text)
    except ChatError as error:
        notes.fail(str(error))
        return None
    prompt = offering.chat.first_prompt(QUESTION)
    hidden = [tool.name for tool in tools if tool.name not in offering.decode(prompt)]
    if hidden:
        notes.fail(f"the prompt does not tell of the tools {', '.join(hidden)}")
        return None
    specs = [tool.spec() for tool in tools]
    native = INSTRUCTIONS.partition("{")[0] not in offering.decode(prompt)
    calls = [ToolCall(id=f"call{i:05d}", name=tools[0].name, arguments=arguments_for(tools[0])) for i in range(2)]
    _read_back(offering, prompt, calls[:1], _written(reading, calls[:1], specs, native=native), notes)
    several = _several(offering, prompt, calls, _written(reading, calls, specs, native=native))
    _answered(offering, prompt, calls, notes)
    _unreadable(offering, prompt, notes)
    return ToolUse(native, several)


def arguments_for(tool: Tool) -> dict[str, Any]:
    """A value for each parameter of a tool, by its type in the schema."""
    properties: Mapping[str, Mapping[str, Any]] = tool.parameters.get("properties", {})
    return {name: _value(schema) for name, schema in properties.items()}


def _value(schema: Mapping[str, Any]) -> Any:
    if schema.get("enum"):
        return schema["enum"][0]
    options = [option for option in schema.get("anyOf", []) if option.get("type") != "null"]
    kind = schema.get("type") or (options[0].get("type") if options else "string")
    return VALUES.get(str(kind), VALUES["string"])


def _written(reading: Reading, calls: Sequence[ToolCall], specs: Sequence[Mapping[str, Any]], *, native: bool) -> str:
    """A reply with these calls as the template writes it, or in the documented format; empty where the template refuses."""
    if not native:
        blocks = [json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False) for call in calls]
        return "\n".join(f"<tool_call>\n{block}\n</tool_call>" for block in blocks)
    before = reading.rendered(QUESTION, tools=specs)
    for as_text in (False, True):  # how the template wants arguments
        spoken: Message = {"role": "assistant", "content": "", "tool_calls": [_spec(call, as_text=as_text) for call in calls]}
        after = reading.rendered([*QUESTION, spoken], tools=specs, opening=False)
        if after.startswith(before):
            return reading.until_stop(after.removeprefix(before))
    return ""


def _spec(call: ToolCall, *, as_text: bool) -> dict[str, Any]:
    spec = call.spec()
    arguments = json.dumps(call.arguments, ensure_ascii=False) if as_text else call.arguments
    return {**spec, "function": {**spec["function"], "arguments": arguments}}


def _read_back(reading: Reading, prompt: Sequence[int], calls: Sequence[ToolCall], written: str, notes: Notes) -> None:
    """One call comes out as it went in."""
    if not written:
        return  # the template puts something else between the prompt and a call; the chat has judged that when it was made
    read = _reply(reading, prompt, written)
    if _told(read.tool_calls) != _told(calls):
        found = [call.error or f"{call.name}({call.arguments})" for call in read.tool_calls] or ["no call"]
        notes.fail(
            f"a call of {calls[0].name} as the template writes it is read as {found[0]}: the environment would not get what the "
            "policy calls",
            'set model.chat_template to one that writes calls as JSON, or model.tool_format = "described"',
        )


def _several(reading: Reading, prompt: Sequence[int], calls: Sequence[ToolCall], written: str) -> bool:
    return bool(written) and _told(_reply(reading, prompt, written).tool_calls) == _told(calls)


def _answered(reading: Reading, prompt: Sequence[int], calls: Sequence[ToolCall], notes: Notes) -> None:
    """A reply of two calls can be answered, whatever the template thinks of two: the answers stand in the next prompt."""
    message = AssistantMessage(content="", tool_calls=tuple(calls), raw=REPLY)
    answers = [dict(tool_message(call, f"turnwise answer {i}")) for i, call in enumerate(calls)]
    ids = [*reading.encode(REPLY), *reading.chat.stop_ids[:1]]
    try:
        after = reading.chat.next_prompt(prompt, ids, [*QUESTION, message.to_message()], answers)
    except (ChatError, ValueError) as error:
        notes.fail(f"a reply of two calls cannot be answered: {error}", "set model.chat_template to one that takes several calls")
        return
    missing = [answer["content"] for answer in answers if answer["content"] not in reading.decode(after)]
    if missing:
        notes.fail(
            f"the prompt after a reply of two calls does not show {missing[0]!r}: the policy would not see what it asked for"
        )


def _unreadable(reading: Reading, prompt: Sequence[int], notes: Notes) -> None:
    """Replies that no format allows are data, never an exception."""
    for text in ("<tool_call>", '<tool_call>\n{"name": ', "{", '[{"name"', "</tool_call>", ""):
        try:
            _reply(reading, prompt, text)
        except Exception as error:
            notes.fail(f"the reply {text!r} raises {type(error).__name__}: {error}")


def _reply(reading: Reading, prompt: Sequence[int], text: str) -> AssistantMessage:
    return reading.chat.reply([*reading.encode(text), *reading.chat.stop_ids[:1]], prompt)


def _told(calls: Sequence[ToolCall]) -> list[tuple[str | None, object, bool]]:
    return [(call.name, call.arguments, call.error is None) for call in calls]
