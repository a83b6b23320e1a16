"""What a chat template does with tools, found by rendering probes: whether it shows them, how it writes calls, how many."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from turnwise.envs.messages import AssistantMessage, Tool, ToolCall, tool_message
from turnwise.orchestrator import described_tools
from turnwise.orchestrator.jinja_template import ChatTemplate
from turnwise.orchestrator.tokenizer import ChatError
from turnwise.orchestrator.tool_formats import CallFormat, first_only, format_of
from turnwise.orchestrator.types import Message

ToolFormat = Literal["auto", "described"]

PROBE = "turnwise probe"
TOOL = Tool(
    name="turnwise_probe_tool",
    description="Probes.",
    parameters={"type": "object", "properties": {"probe": {"type": "string", "description": "A text."}}, "required": ["probe"]},
)
QUESTION: Message = {"role": "user", "content": "?"}


@dataclass(frozen=True)
class ToolStyle:
    """How conversations with tools are shown to a template.

    Args:
        format: reads the calls of a reply.
        native: the template shows tools, calls and answers itself; they are described in the system prompt otherwise.
        several: a reply may make more than one call.
        as_text: a reply with calls may be given to the template as the text that was sampled.
        text_arguments: the template wants arguments as JSON text.
        system_role: the template takes system messages.
    """

    format: CallFormat
    native: bool = False
    several: bool = True
    as_text: bool = True
    text_arguments: bool = False
    system_role: bool = True

    def read(self, text: str) -> AssistantMessage:
        message = self.format.read(text)
        return message if self.several else first_only(message)

    def shown(self, messages: Sequence[Message], specs: Sequence[Mapping[str, Any]], *, opening: bool = True) -> list[Message]:
        """Messages as the template takes them; `opening`: the conversation is one from its beginning."""
        if not self.native:
            shown_specs = specs if opening else ()
            return described_tools.described(messages, shown_specs, system_role=self.system_role)
        return [self._reply(message) for message in messages]

    def _reply(self, message: Message) -> Message:
        calls = message.get("tool_calls")
        if not calls:
            return message
        clean = all("error" not in call for call in calls) and (self.several or len(calls) == 1)
        if self.as_text or not clean:
            return described_tools.as_said(message)
        return {"role": message["role"], "content": message["content"], "tool_calls": _calls(calls, self.text_arguments)}


def find_style(template: ChatTemplate, tool_format: ToolFormat = "auto") -> ToolStyle:
    """How a template takes tools.

    Raises:
        ChatError: it shows tools, but writes calls in a form that nothing here reads, or shows no answers.
    """
    if tool_format == "described" or TOOL.name not in _attempt(template, [QUESTION]):
        return ToolStyle(described_tools.FORMAT, system_role=_takes_system_messages(template))
    for text_arguments in (False, True):
        style = _native(template, text_arguments)
        if style is not None:
            return style
    said = _attempt(template, [QUESTION, _spoken([PROBE], False)], add_generation_prompt=False)
    raise ChatError(
        f"the chat template shows tools, but how it writes calls is not understood ({said[-200:]!r}); set model.chat_template to "
        'one that writes them as JSON, or model.tool_format = "described"'
    )


def _native(template: ChatTemplate, text_arguments: bool) -> ToolStyle | None:
    one = _reply_text(template, [PROBE], text_arguments)
    found = format_of(one, TOOL.name, {"probe": PROBE}) or _library_format(one)
    if found is None or not _recovers(found, one, [PROBE]):
        return None
    spoken = _spoken([PROBE], text_arguments)
    answered = _attempt(template, [QUESTION, spoken, _answer(0)])
    if _answer(0)["content"] not in answered:
        return None
    as_text = _attempt(template, [QUESTION, {"role": "assistant", "content": one}, _answer(0)]) == answered
    two = _reply_text(template, [PROBE, "another"], text_arguments)
    several = _recovers(found, two, [PROBE, "another"])
    return ToolStyle(found, True, several, as_text, text_arguments)


def _library_format(rendered: str) -> CallFormat | None:
    return None


def _reply_text(template: ChatTemplate, values: Sequence[str], text_arguments: bool) -> str:
    """What the template writes for a reply with one call a value; empty when it refuses."""
    plain = _attempt(template, [QUESTION, {"role": "assistant", "content": PROBE}], add_generation_prompt=False)
    head, _, tail = plain.partition(PROBE)
    whole = _attempt(template, [QUESTION, _spoken(values, text_arguments)], add_generation_prompt=False)
    begin = next((i for i, pair in enumerate(zip(head, whole, strict=False)) if pair[0] != pair[1]), len(head))
    return whole[begin:].removesuffix(tail) if whole else ""


def _recovers(found: CallFormat, text: str, values: Sequence[str]) -> bool:
    calls = found.read(text).tool_calls
    return [(call.name, call.arguments, call.error) for call in calls] == [(TOOL.name, {"probe": v}, None) for v in values]


def _spoken(values: Sequence[str], text_arguments: bool) -> Message:
    calls = [ToolCall(id=f"call{i:05d}", name=TOOL.name, arguments={"probe": value}) for i, value in enumerate(values)]
    return {"role": "assistant", "content": "", "tool_calls": _calls([call.spec() for call in calls], text_arguments)}


def _answer(number: int) -> Message:
    return dict(tool_message(ToolCall(id=f"call{number:05d}", name=TOOL.name), f"turnwise answer {number}"))


def _calls(calls: Sequence[Mapping[str, Any]], text_arguments: bool) -> list[dict[str, Any]]:
    if not text_arguments:
        return [dict(call) for call in calls]
    return [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in calls
    ]


def _takes_system_messages(template: ChatTemplate) -> bool:
    try:
        return PROBE in template.render([{"role": "system", "content": PROBE}, QUESTION])
    except ChatError:
        return False


def _attempt(template: ChatTemplate, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
    """The rendered conversation, with the probe tool on offer; empty when the template refuses it."""
    try:
        return template.render(messages, tools=[TOOL.spec()], add_generation_prompt=add_generation_prompt)
    except ChatError:
        return ""
