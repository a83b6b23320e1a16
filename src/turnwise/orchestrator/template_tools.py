"""What a chat template does with tools, found by rendering probes: whether it shows them, how it writes calls, how many."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from turnwise.envs.messages import AssistantMessage, Tool, ToolCall, tool_message
from turnwise.orchestrator import described_tools
from turnwise.orchestrator.tokenizer import ChatError
from turnwise.orchestrator.tool_formats import CallFormat, first_only, format_of
from turnwise.orchestrator.types import Message

ToolFormat = Literal["auto", "described"]
Render = Callable[[Sequence[Message], bool], str]  # (messages, generation prompt?), the probe tool on offer; empty when refused

PROBE = "turnwise probe"
ANOTHER = "another turnwise probe"
TOOL = Tool(
    name="turnwise_probe_tool",
    description="Probes.",
    parameters={"type": "object", "properties": {"probe": {"type": "string", "description": "A text."}}, "required": ["probe"]},
)
QUESTION: Message = {"role": "user", "content": "?"}


@dataclass(frozen=True)
class ToolStyle:
    """How conversations with tools are shown to a template, and how replies are read.

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

    def read(self, text: str, *, thinking: bool = False) -> AssistantMessage:
        """What a reply says and calls; `thinking`: the prompt ended inside a thought."""
        message = self.format.read(text, thinking=thinking)
        return message if self.several else first_only(message)

    def shown(self, messages: Sequence[Message], specs: Sequence[Mapping[str, Any]]) -> list[Message]:
        """Messages as the template takes them, with the tools of `specs` described where it knows none."""
        if not self.native:
            return described_tools.described(messages, specs, system_role=self.system_role)
        return [self._reply(message) for message in messages]

    def placeholder(self, text: str, new: Sequence[Message], *, thought: str = "") -> Message:
        """A reply that `new` may follow, with `text` once in it, as near to its end as can be."""
        answers = [message for message in new if message["role"] == "tool"]
        if self.as_text or not self.native or not answers:
            return {"role": "assistant", "content": thought + text}
        last = len(answers) - 1 if self.several else 0
        calls = [
            _call(message["tool_call_id"], message["name"] or TOOL.name, text if i == last else "")
            for i, message in enumerate(answers[: last + 1])
        ]
        return {"role": "assistant", "content": thought, "tool_calls": _as_wanted(calls, self.text_arguments)}

    def _reply(self, message: Message) -> Message:
        calls = message.get("tool_calls")
        if not calls:
            return message
        sound = all("error" not in call for call in calls) and (self.several or len(calls) == 1)
        if self.as_text and ("raw" in message or not sound):
            return described_tools.as_said(message, self.format)
        shown = _as_wanted(calls[: None if self.several else 1], self.text_arguments)
        return {"role": message["role"], "content": message["content"], "tool_calls": shown}


def find_style(render: Render, library: Callable[[str], CallFormat | None], *, system_role: bool) -> ToolStyle:
    """How a template takes tools.

    Args:
        render: the template.
        library: the reader of the library `renderers` for a rendered reply that is no JSON, if there is one.
        system_role: whether the template takes system messages.

    Raises:
        ChatError: it shows tools, but writes calls in a form that nothing here reads, or shows no answers to them.
    """
    if TOOL.name not in render([QUESTION], True):
        return ToolStyle(described_tools.FORMAT, system_role=system_role)
    for text_arguments in (False, True):
        style = _native(render, library, text_arguments)
        if style is not None:
            return style
    written = next(filter(None, (_reply_text(render, [PROBE], as_text) for as_text in (False, True))), "not at all")
    raise ChatError(
        "the chat template shows tools, but the way in which it writes a call is not understood, or it shows no answers; it "
        f'writes {written!r}. Set model.chat_template to one that writes calls as JSON, or model.tool_format = "described"'
    )


def carries_several(render: Render) -> bool:
    """Whether a reply with two calls can be rendered, both of them."""
    return ANOTHER in _reply_text(render, [PROBE, ANOTHER], False)


def json_format(render: Render) -> CallFormat | None:
    """The format in which a call is rendered, when that is JSON."""
    return format_of(_reply_text(render, [PROBE], False), TOOL.name, {"probe": PROBE})


def _native(render: Render, library: Callable[[str], CallFormat | None], text_arguments: bool) -> ToolStyle | None:
    one = _reply_text(render, [PROBE], text_arguments)
    found = format_of(one, TOOL.name, {"probe": PROBE}) or library(one)
    if found is None or not _recovers(found, one, [PROBE]):
        return None
    answered = render([QUESTION, _spoken([PROBE], text_arguments), _answer()], True)
    if _answer()["content"] not in answered:
        return None
    as_text = render([QUESTION, {"role": "assistant", "content": one}, _answer()], True) == answered
    two = _reply_text(render, [PROBE, ANOTHER], text_arguments)
    return ToolStyle(found, True, _recovers(found, two, [PROBE, ANOTHER]), as_text, text_arguments)


def _reply_text(render: Render, values: Sequence[str], text_arguments: bool) -> str:
    """What the template writes for a reply with one call a value; empty when it refuses."""
    plain = render([QUESTION, {"role": "assistant", "content": PROBE}], False)
    whole = render([QUESTION, _spoken(values, text_arguments)], False)
    head, _, tail = plain.partition(PROBE)
    begin = next((i for i, pair in enumerate(zip(head, whole, strict=False)) if pair[0] != pair[1]), len(head))
    return whole[begin:].removesuffix(tail)


def _recovers(found: CallFormat, text: str, values: Sequence[str]) -> bool:
    calls = found.read(text).tool_calls
    return [(call.name, call.arguments, call.error) for call in calls] == [(TOOL.name, {"probe": v}, None) for v in values]


def _spoken(values: Sequence[str], text_arguments: bool) -> Message:
    calls = [_call(f"call{i:05d}", TOOL.name, value) for i, value in enumerate(values)]
    return {"role": "assistant", "content": "", "tool_calls": _as_wanted(calls, text_arguments)}


def _call(call_id: str, name: str, value: str) -> dict[str, Any]:
    return ToolCall(id=call_id, name=name, arguments={"probe": value}).spec()


def _answer() -> Message:
    return dict(tool_message(ToolCall(id="call00000", name=TOOL.name), "turnwise answer"))


def _as_wanted(calls: Sequence[Mapping[str, Any]], text_arguments: bool) -> list[dict[str, Any]]:
    if not text_arguments:
        return [dict(call) for call in calls]
    return [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in calls
    ]
