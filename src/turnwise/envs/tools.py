"""Tools from typed methods: `@tool` marks one, its signature becomes the JSON schema, calls are validated against it."""

import contextlib
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from turnwise.envs.docstrings import read_docstring
from turnwise.envs.messages import Tool
from turnwise.envs.suggest import did_you_mean

MARK = "__turnwise_tool__"
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")  # what every serving API accepts as the name of a function
SHOWN_ARGUMENTS = 3  # unknown ones
SHOWN_CHARACTERS = 80  # of a wrong value, in an answer to the policy
PLACEHOLDERS: dict[str, Any] = {"string": "...", "integer": 1, "number": 0.5, "boolean": True, "array": [], "object": {}}

Method = TypeVar("Method", bound=Callable[..., str])


class ToolError(Exception):
    """Raised by a tool for what the policy did wrong: its words are the answer to the call, and the episode goes on."""


class Done(str):
    """The answer of a tool that ends the episode: `return Done("Correct.")`."""

    __slots__ = ()


@overload
def tool(method: Method, /) -> Method: ...
@overload
def tool(*, name: str | None = None) -> Callable[[Method], Method]: ...
def tool(method: Any = None, /, *, name: str | None = None) -> Any:
    """Mark a method of a `ToolEnv` as a tool.

    Its parameters need annotations; the first paragraph of its docstring is the tool's description, and an "Args:" section
    describes the parameters. It returns text, or `Done(text)` to end the episode.

    Args:
        method: the method, when used without parentheses.
        name: what replies call it; the method's name when not given.
    """

    def mark(function: Any) -> Any:
        setattr(function, MARK, name or function.__name__)
        return function

    return mark if method is None else mark(method)


@dataclass(frozen=True)
class Parameter:
    """One argument of a tool."""

    name: str
    adapter: TypeAdapter[Any]
    schema: dict[str, Any]
    default: Any  # inspect.Parameter.empty where the argument is required

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def read(self, value: Any) -> Any:
        """`value` as the method takes it.

        A text that is the JSON of what is wanted, one element in place of a list, and null for what may be left out are read
        as what was meant: models write all three.

        Raises:
            ToolError: when it cannot be read.
        """
        try:
            return self.adapter.validate_python(value)
        except ValidationError as error:
            if value is None and not self.required:
                return self.default
            for meant in self._readings(value):
                try:
                    return self.adapter.validate_python(meant)
                except ValidationError:
                    continue  # the first error is about what was written
            raise ToolError(f"{self.name} = {_short(value)}: {_words(error)}.") from error

    def _readings(self, value: Any) -> list[Any]:
        readings: list[Any] = []
        if isinstance(value, str):
            with contextlib.suppress(ValueError, RecursionError):  # plain text has no second reading
                readings.append(json.loads(value))
        if self.schema.get("type") == "array" and not isinstance(value, list | dict):
            readings += [[one] for one in (*readings, value)]
        return readings


@dataclass(frozen=True)
class ToolMethod:
    """A tool and how to call it."""

    tool: Tool
    attribute: str  # name of the method in its class
    parameters: tuple[Parameter, ...]

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Validated arguments for the method.

        Raises:
            ToolError: naming every argument that is unknown, missing or wrong.
        """
        known = {parameter.name: parameter for parameter in self.parameters}
        unknown = [name for name in given if name not in known][:SHOWN_ARGUMENTS]
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        wrong = [f"{self.tool.name} has no argument {_short(n)}; {takes}.{did_you_mean(n[:80], known)}" for n in unknown]
        wrong += [f"{name} is missing." for name, parameter in known.items() if parameter.required and name not in given]
        arguments: dict[str, Any] = {}
        for name, parameter in known.items():
            if name in given:
                try:
                    arguments[name] = parameter.read(given[name])
                except ToolError as error:
                    wrong.append(str(error))
        if wrong:
            raise ToolError(" ".join(wrong))
        return arguments

    def example(self) -> str:
        """A call in the right form, as JSON, with the arguments that must be there."""
        arguments = {p.name: _placeholder(p.schema) for p in self.parameters if p.required}
        return json.dumps({"name": self.tool.name, "arguments": arguments}, ensure_ascii=False)


def tool_methods(cls: type) -> dict[str, ToolMethod]:
    """The tools of a class by their names, in the order of definition, those of base classes first.

    Raises:
        TypeError: for a tool whose name, signature or docstring cannot be offered to a policy; it says what to write.
    """
    found: dict[str, str] = {}  # attribute -> name of the tool
    for base in reversed(cls.__mro__):
        for attribute, value in vars(base).items():
            name = getattr(value, MARK, None)
            if name is not None:
                found[attribute] = name
            elif attribute in found and value is None:
                del found[attribute]
            elif attribute in found:
                raise TypeError(
                    f"{base.__name__}.{attribute} replaces a tool without being one; write @tool above it, "
                    f"or `{attribute} = None` to leave the tool out"
                )
    methods = [_read_method(cls, attribute, name) for attribute, name in found.items()]
    by_name = {method.tool.name: method for method in methods}
    if len(by_name) < len(methods):
        raise TypeError(f"{cls.__name__} has two tools of one name: {', '.join(found.values())}")
    return by_name


def _read_method(cls: type, attribute: str, name: str) -> ToolMethod:
    where = f"tool {cls.__name__}.{attribute}"
    if not NAME.fullmatch(name):
        raise TypeError(f"{where}: the name {name!r} must be letters, digits, '_' and '-', not beginning with a digit")
    function = getattr(cls, attribute)
    description, texts = read_docstring(inspect.getdoc(function) or "")
    if not description:
        raise TypeError(f"{where} needs a docstring: its first paragraph tells the policy what the tool does")
    parameters = list(inspect.signature(function).parameters.values())[1:]  # without self
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"{where}: parameter {parameter} must be one that can be given by its name")
        if parameter.name not in hints:
            raise TypeError(f"{where}: parameter {parameter.name} needs an annotation, from which its JSON schema is made")
    for name_in_docstring in texts:
        if name_in_docstring not in {parameter.name for parameter in parameters}:
            raise TypeError(f"{where}: its docstring describes {name_in_docstring!r}, which is no parameter")
    adapters = {p.name: _adapter(hints[p.name], texts.get(p.name), f"{where}: parameter {p.name}") for p in parameters}
    schemas, definitions = _schemas(adapters)
    read = tuple(_parameter(p, adapters[p.name], schemas[p.name]) for p in parameters)
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {p.name: p.schema for p in read},
        "required": [p.name for p in read if p.required],
        **definitions,
    }
    return ToolMethod(Tool(name=name, description=description, parameters=schema), attribute, read)


def _adapter(annotation: Any, text: str | None, where: str) -> TypeAdapter[Any]:
    described: Any = annotation if text is None else typing.Annotated[annotation, Field(description=text)]
    config = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)
    try:
        return TypeAdapter(described, config=config)
    except PydanticUserError as error:
        if error.code != "type-adapter-config-unused":
            raise TypeError(f"{where} has an annotation that cannot be validated: {error.message}") from error
        return TypeAdapter(described)  # models and typed dicts bring their own configuration


def _schemas(adapters: Mapping[str, TypeAdapter[Any]]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    inputs = [(name, "validation", adapter) for name, adapter in adapters.items()]
    made, definitions = TypeAdapter.json_schemas(typing.cast(Any, inputs), schema_generator=_PlainSchema)
    return {str(name): schema for (name, _), schema in made.items()}, definitions


def _parameter(parameter: inspect.Parameter, adapter: TypeAdapter[Any], schema: dict[str, Any]) -> Parameter:
    default = parameter.default
    if default is None and "anyOf" in schema:  # leaving it out says the same as null, in a schema that is easier to follow
        choices = [choice for choice in schema["anyOf"] if choice != {"type": "null"}]
        rest = {key: value for key, value in schema.items() if key != "anyOf"}
        schema = {**choices[0], **rest} if len(choices) == 1 else {"anyOf": choices, **rest}
    elif default is not parameter.empty and default is not None:
        schema = {**schema, "default": default}
    return Parameter(parameter.name, adapter, schema, default)


class _PlainSchema(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # "Query" for `query` says nothing and costs tokens


def _words(error: ValidationError) -> str:
    """What is wrong with a value, without pydantic's layout."""
    parts: list[str] = []
    for detail in error.errors(include_url=False, include_context=False)[:3]:
        place = ".".join(str(part) for part in detail["loc"])
        parts.append(f"{place}: {detail['msg']}" if place else detail["msg"])
    return "; ".join(parts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def _placeholder(schema: Mapping[str, Any]) -> Any:
    if "enum" in schema:
        return schema["enum"][0]
    return schema.get("const", PLACEHOLDERS.get(str(schema.get("type", "string")), "..."))
