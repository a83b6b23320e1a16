"""How calls are written in replies: JSON between marks, as almost every model has it, found by looking at a rendered probe."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from turnwise.envs.messages import AssistantMessage, ToolCall

ONE_CALL = "one call a turn: this model's format carries only one; call it again in your next reply"
PYTHON_TAG = "<|python_tag|>"  # Llama 3 may begin a call with it
MAX_DEPTH = 32  # of objects and lists in arguments; encoders and validators on the way recurse
SPACE = re.compile(r"\s*")
SEPARATORS = " \t\r\n,;"  # between bare calls

_SCANNER = json.JSONDecoder(strict=False)  # finds where a value ends; msgspec judges it


class CallFormat(Protocol):
    """Reads the calls of a reply."""

    def read(self, text: str, *, thinking: bool = False) -> AssistantMessage:
        """The reply's content and its calls, without ids; `thinking`: the prompt ended inside a thought."""
        ...

    def write(self, function: Mapping[str, Any]) -> str:
        """A call that was not sampled, from its `name` and `arguments`, for a template that does not write it itself."""
        ...


@dataclass(frozen=True)
class JsonCalls:
    """Calls as JSON between two marks, `<tool_call>{"name": …, "arguments": {…}}</tool_call>` (hermes) for instance.

    Args:
        opening: what stands before a call; empty for bare JSON that is the whole reply, as Llama 3 writes it.
        closing: what stands after a call; empty where only the end of the reply does.
        arguments_key: under which the arguments are; `arguments` and `parameters` are understood beside it.
        name_key: under which the name is.
    """

    opening: str = "<tool_call>"
    closing: str = "</tool_call>"
    arguments_key: str = "arguments"
    name_key: str = "name"

    def read(self, text: str, *, thinking: bool = False) -> AssistantMessage:
        begin = after_thoughts(text, thinking=thinking)
        said, calls = self._marked(text[begin:]) if self.opening else self._bare(text[begin:])
        if not calls:
            return AssistantMessage(content=text)
        return AssistantMessage(content=(text[:begin] + said).strip(), tool_calls=tuple(calls), raw=text)

    def write(self, function: Mapping[str, Any]) -> str:
        call = {self.name_key: function["name"], self.arguments_key: function["arguments"]}
        return "\n".join(filter(None, [self.opening, json.dumps(call, ensure_ascii=False), self.closing]))

    def _marked(self, text: str) -> tuple[str, list[ToolCall]]:
        said, calls, position = list[str](), list[ToolCall](), 0
        while (start := text.find(self.opening, position)) >= 0:
            said.append(text[position:start])
            found, position = self._block(text, start + len(self.opening))
            calls += found
        return "".join([*said, text[position:]]), calls

    def _block(self, text: str, start: int) -> tuple[list[ToolCall], int]:
        """The calls after one opening mark, and where the text goes on."""
        end = _json_end(text, start)
        if end is not None:
            after = _after_space(text, end)
            if not self.closing:
                return self._values(text[start:end].strip()), end
            if text.startswith(self.closing, after):
                return self._values(text[start:end].strip()), after + len(self.closing)
        following = text.find(self.opening, start)
        limit = len(text) if following < 0 else following
        closed = text.find(self.closing, start, limit) if self.closing else limit
        raw = text[start : limit if closed < 0 else closed].strip()
        if closed < 0:
            return [ToolCall(id="", raw=raw, error=f"the call is not finished: {self.closing} is missing after it")], limit
        return [ToolCall(id="", raw=raw, error=_json_trouble(raw))], closed + len(self.closing)

    def _bare(self, text: str) -> tuple[str, list[ToolCall]]:
        said, tag, body = ("", "", text) if text.lstrip().startswith("{") else text.partition(PYTHON_TAG)
        if not (tag or body):
            return text, []
        body = body.strip()
        calls: list[ToolCall] = []
        while body:
            end = _json_end(body, 0)
            if end is None or not body.startswith("{"):
                if calls and not body.startswith("{"):
                    return f"{said}{body}", calls
                return said, [*calls, ToolCall(id="", raw=body, error=_json_trouble(body))]
            calls += self._values(body[:end])
            if not tag and len(calls) == 1 and calls[0].name is None and f'"{self.name_key}"' not in body[:end]:
                return text, []  # JSON, but no call
            body = body[end:].lstrip(SEPARATORS).removeprefix(PYTHON_TAG)
        return said, calls

    def _values(self, raw: str) -> list[ToolCall]:
        """The calls that a JSON value spells: one for an object, one an element for a list."""
        try:
            value = msgspec.json.decode(raw)
        except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError) as error:
            return [ToolCall(id="", raw=raw, error=f"not valid JSON ({error})")]
        values: list[Any] = value if isinstance(value, list) and value else [value]
        return [self._call(value, raw if len(values) == 1 else msgspec.json.encode(value).decode()) for value in values]

    def _call(self, value: Any, raw: str) -> ToolCall:
        if not isinstance(value, dict):
            return ToolCall(id="", raw=raw, error=f'a call is a JSON object with "{self.name_key}" and "{self.arguments_key}"')
        keys = (self.arguments_key, "arguments", "parameters")
        arguments = next((value[key] for key in keys if key in value), {})
        return checked_call(value.get(self.name_key), arguments, raw, name_key=self.name_key)


def after_thoughts(text: str, *, thinking: bool = False) -> int:
    """Where what a reply says begins, after its `<think>` block; calls drafted in thoughts are not made."""
    if not thinking and not text.lstrip().startswith("<think>"):
        return 0
    closed = text.find("</think>")
    return len(text) if closed < 0 else closed + len("</think>")


def checked_call(name: Any, arguments: Any, raw: str, *, own_id: str = "", name_key: str = "name") -> ToolCall:
    """A call from what was read, with what is wrong about its shape; whether there is such a tool is the environment's to say."""
    if not (isinstance(name, str) and name):
        return ToolCall(id=own_id, raw=raw, error=f'the call has no "{name_key}"')
    if _too_deep(arguments):
        return ToolCall(id=own_id, raw=raw, error=f"the arguments are nested deeper than {MAX_DEPTH} levels")
    try:  # what is no JSON would be lost, or would raise, on the way to the environment
        name, arguments = msgspec.json.decode(msgspec.json.encode((name, arguments)))
    except (msgspec.MsgspecError, UnicodeEncodeError) as error:
        return ToolCall(id=own_id, raw=raw, error=f"not valid JSON ({error})")
    if not isinstance(arguments, dict):
        return ToolCall(id=own_id, name=name, raw=raw, error="the arguments must be a JSON object")
    return ToolCall(id=own_id, name=name, arguments=arguments, raw=raw)


def _too_deep(value: Any, room: int = MAX_DEPTH) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return room < 0 or any(_too_deep(part, room - 1) for part in inner)


STATUS_WORDS = {  # of `renderers.base.ToolCallParseStatus`, for calls of which no name with arguments could be read
    "invalid_json": "not valid JSON",
    "unclosed_block": "the call is not finished: its closing mark is missing",
    "missing_name": 'the call has no "name"',
    "malformed_structure": "the call does not have the structure that this model's format asks for",
}


def parsed_call(parsed: Any, *, texts: Collection[str] = ()) -> ToolCall:
    """A `renderers.base.ParsedToolCall` as a call of ours.

    Args:
        texts: arguments that are texts by their schema, which a parser without schemas may have taken for numbers.
    """
    call = checked_call(parsed.name, parsed.arguments, parsed.raw, own_id=parsed.id or "")
    words = STATUS_WORDS.get(str(parsed.status))
    readable = call.arguments is not None and str(parsed.status) == "invalid_json"  # values in plain text, fit to be judged
    if words is not None and not readable:
        return msgspec.structs.replace(call, arguments=None, error=words)
    if call.arguments is None or not texts:
        return call
    as_written = {k: _written(value) if k in texts else value for k, value in call.arguments.items()}
    return msgspec.structs.replace(call, arguments=as_written)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def first_only(message: AssistantMessage) -> AssistantMessage:
    """The reply in a format of one call a turn: every further call carries the reason why it is not run."""
    calls = [
        call if i == 0 or call.error else msgspec.structs.replace(call, error=ONE_CALL)
        for i, call in enumerate(message.tool_calls)
    ]
    return msgspec.structs.replace(message, tool_calls=tuple(calls))


def format_of(rendered: str, name: str, arguments: dict[str, Any]) -> JsonCalls | None:
    """The format of a rendered reply that makes one call; None when the call is not written as JSON."""
    for start, end, value in _json_objects(rendered):
        key_of = {json.dumps(inner): key for key, inner in value.items()}
        keys = [key_of.get(json.dumps(wanted), "") for wanted in (arguments, name)]
        if all(keys):
            opening, closing = rendered[:start].strip().removesuffix("["), rendered[end:].strip().removeprefix("]")
            return JsonCalls(opening.strip(), closing.strip(), *keys)
    return None


def _json_objects(text: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
    for start, character in enumerate(text):
        end = _json_end(text, start) if character == "{" else None
        if end is not None:
            value = json.loads(text[start:end], strict=False)
            if isinstance(value, dict):
                yield start, end, value


def _json_end(text: str, start: int) -> int | None:
    """Where the JSON value ends that begins at `start`, after white space; None when none begins there."""
    try:
        return _SCANNER.raw_decode(text, _after_space(text, start))[1]
    except (ValueError, RecursionError):
        return None


def _after_space(text: str, start: int) -> int:
    found = SPACE.match(text, start)
    return found.end() if found else start


def _json_trouble(raw: str) -> str:
    try:
        msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError) as error:
        return f"not valid JSON ({error})"
    return "there is more than one JSON value in one call"
