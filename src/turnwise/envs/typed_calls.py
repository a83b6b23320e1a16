"""Calls as a person types them: `search some words`, `search(query="some words", k=3)`, or the JSON that a model writes."""

import ast
import json
from collections.abc import Sequence
from typing import Any

from turnwise.envs.messages import AssistantMessage, Tool, ToolCall

HELP = 'Type `tool words`, `tool(name="value", ...)`, or {"name": "tool", "arguments": {...}}.'


def read_typed(line: str, tools: Sequence[Tool]) -> AssistantMessage:
    """A typed line as a reply; what is no call is its content.

    A call that cannot be read is malformed, as a model's would be: the environment says what is wrong with it.
    """
    text = line.strip()
    if text.startswith(("{", "[")):
        return _read_json(text)
    name = text.split("(")[0].split(" ")[0]
    tool = next((tool for tool in tools if tool.name == name), None)
    if tool is not None and text.startswith(f"{name}("):
        return _said(_read_python(text, tool))
    if tool is not None:
        return _said(_read_words(tool, text[len(name) :].strip()))
    if name.isidentifier() and text.startswith(f"{name}(") and text.endswith(")"):
        return _said([ToolCall(id="", name=name, arguments={}, raw=text)])  # the environment knows which name was meant
    return AssistantMessage(content=line)


def signature(tool: Tool) -> str:
    """`search(query: string, k?: integer)`."""
    required = tool.parameters.get("required", [])
    properties: dict[str, dict[str, Any]] = tool.parameters.get("properties", {})
    parts = [f"{name}{'' if name in required else '?'}: {_type(schema)}" for name, schema in properties.items()]
    return f"{tool.name}({', '.join(parts)})"


def _read_words(tool: Tool, words: str) -> list[ToolCall]:
    """Everything behind the name is the first argument."""
    names = list(tool.parameters.get("properties", {}))
    return [ToolCall(id="", name=tool.name, arguments={names[0]: words} if words and names else {}, raw=f"{tool.name} {words}")]


def _read_python(text: str, tool: Tool) -> list[ToolCall]:
    names = list(tool.parameters.get("properties", {}))
    try:
        call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call):
            raise ValueError("it is not a single call")
        if len(call.args) > len(names):
            raise ValueError(f"it has {len(call.args)} values, and {tool.name} takes {len(names)}")
        given = [*zip(names, call.args, strict=False), *((str(keyword.arg), keyword.value) for keyword in call.keywords)]
        arguments = {name: _literal(name, value) for name, value in given}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [ToolCall(id="", name=tool.name, raw=text, error=str(error).partition(" (<")[0])]
    return [ToolCall(id="", name=tool.name, arguments=arguments, raw=text)]


def _literal(name: str, value: ast.expr) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the value of {name} is not a number, a list or a text in quotes") from error


def _read_json(text: str) -> AssistantMessage:
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _said([ToolCall(id="", raw=text, error=str(error))])
    calls: list[ToolCall] = []
    for one in read if isinstance(read, list) else [read]:
        name, arguments = (one.get("name"), one.get("arguments", {})) if isinstance(one, dict) else (None, None)
        if isinstance(name, str) and isinstance(arguments, dict):
            calls.append(ToolCall(id="", name=name, arguments=arguments, raw=text))
        else:
            calls.append(ToolCall(id="", raw=text, error="it has no name and arguments"))
    return _said(calls)


def _said(calls: Sequence[ToolCall]) -> AssistantMessage:
    return AssistantMessage(content="", tool_calls=tuple(calls)).numbered(())


def _type(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(json.dumps(value) for value in schema["enum"])
    choices = [_type(choice) for choice in schema.get("anyOf", ())]
    if choices:
        return " | ".join(choices)
    kind = str(schema.get("type", "any"))
    return f"list of {_type(schema['items'])}" if kind == "array" and "items" in schema else kind
