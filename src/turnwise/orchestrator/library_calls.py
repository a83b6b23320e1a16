"""Calls that are no JSON - XML, pairs of keys and values - read by the parsers of the library `renderers`."""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from turnwise.envs.messages import AssistantMessage, Tool
from turnwise.orchestrator.tool_formats import JsonCalls, after_thoughts, parsed_call

SIGNS = {"<function=": "qwen3.5", "<arg_key>": "glm", "<｜tool▁calls▁begin｜>": "deepseek-v3"}  # in a rendered call: the parser


class LibraryCalls:
    """A parser of `renderers.parsers` as a `CallFormat`.

    Args:
        name: of the parser.
        tokenizer: its vocabulary holds the marks around calls as tokens.
        tools: on offer; values of arguments that are texts by their schemas stay texts.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, tools: Sequence[Tool]) -> None:
        from renderers.parsers import get_tool_parser  # late: the library takes 2.3 s to import

        self._tokenizer = _Vocabulary(tokenizer)
        self._parser: Any = get_tool_parser(name, self._tokenizer)
        self._texts = {tool.name: _text_arguments(tool) for tool in tools}

    def read(self, text: str, *, thinking: bool = False) -> AssistantMessage:
        begin = after_thoughts(text, thinking=thinking)
        content_ids, parsed = self._parser.extract(self._tokenizer.encode(text[begin:]))
        if not parsed:
            return AssistantMessage(content=text)
        calls = [parsed_call(call, texts=self._texts.get(call.name, frozenset())) for call in parsed]
        said = text[:begin] + self._tokenizer.decode(content_ids)
        return AssistantMessage(content=said.strip(), tool_calls=tuple(calls), raw=text)

    def write(self, function: Mapping[str, Any]) -> str:
        return JsonCalls().write(function)


def library_format(rendered: str, tokenizer: Tokenizer, tools: Sequence[Tool]) -> LibraryCalls | None:
    """The reader for a rendered call, known by the signs in it."""
    name = next((name for sign, name in SIGNS.items() if sign in rendered), None)
    return None if name is None else LibraryCalls(name, tokenizer, tools)


class _Vocabulary:
    """The part of a transformers tokenizer that those parsers use."""

    unk_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


def _text_arguments(tool: Tool) -> frozenset[str]:
    properties: dict[str, Any] = tool.parameters.get("properties", {})
    return frozenset(name for name, schema in properties.items() if schema.get("type") == "string")
