"""Between text and the models of an OpenEnv server: an observation as text, and a reply as an action."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, cast

from turnwise.adapters.openenv.wire import OpenEnvError

COMMON_FIELDS = frozenset({"done", "reward", "metadata"})  # of every observation; `metadata` of every action too
MAX_BRACES = 64  # places in a reply where a JSON object may begin
SHOWN_CHARACTERS = 200


class Misfit(Exception):
    """A reply that is no action; the text says to the policy what to reply instead."""


@dataclass(frozen=True)
class ObservationText:
    """What the policy reads of an observation.

    Args:
        schema: JSON schema of the observation, whose only field of text is what is read; of an observation that has none or
            several, every field on a line of its own.
        template: text in place of that rule, with `{field}` for the fields of the observation, `{reward}` and `{done}`.
        key: name of the template's argument, for errors.
    """

    schema: Mapping[str, Any]
    template: str | None = None
    key: str = "observation"

    def read(self, result: Mapping[str, Any]) -> str:
        """The text of an answer to reset or step.

        Raises:
            OpenEnvError: the answer holds no observation, or lacks what the template names.
        """
        observation = result.get("observation")
        if not isinstance(observation, dict):
            raise OpenEnvError(f"the server's observation is {_short(observation)}, not an object")
        fields = cast(dict[str, Any], observation)
        if self.template is not None:
            return self._filled({**fields, "reward": result.get("reward"), "done": result.get("done")})
        shown = {name: value for name, value in fields.items() if name not in COMMON_FIELDS and value is not None}
        texts = [name for name, one in _properties(self.schema).items() if name not in COMMON_FIELDS and _is_text(one)]
        if len(texts) == 1 and isinstance(shown.get(texts[0]), str):
            return shown[texts[0]]
        return "\n".join(f"{name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in shown.items())

    def _filled(self, values: Mapping[str, Any]) -> str:
        assert self.template is not None
        try:
            return Formatter().vformat(self.template, (), values)
        except (KeyError, IndexError, AttributeError, ValueError) as error:
            known = ", ".join(sorted(values))
            raise OpenEnvError(
                f"args.{self.key} = {self.template!r} cannot be filled in ({type(error).__name__}: {error}); "
                f"the observation has {known}"
            ) from error


@dataclass(frozen=True)
class ActionText:
    """How a reply becomes an action.

    Args:
        schema: JSON schema of the action.
        fixed: fields that are the same in every action.
        only: name of the field that is the reply; found by the schema when not given.
    """

    schema: Mapping[str, Any]
    fixed: Mapping[str, Any] = field(default_factory=dict[str, Any])
    only: str | None = None

    def read(self, reply: str) -> dict[str, Any]:
        """The action that a reply says: the reply itself where one field is open, or the JSON object in it where several are.

        Raises:
            Misfit: no JSON object of such fields is in the reply.
            OpenEnvError: the schema has no field that a reply could fill.
        """
        constants = {name: one["const"] for name, one in self._open().items() if "const" in one}
        single = self.field()
        if single is not None:
            return {**constants, **self.fixed, single: self._value(single, reply)}
        found = _object_in(reply, self._asked())
        if found is None:
            raise Misfit(f"The reply is no action. {self.form()}")
        return {**constants, **found, **self.fixed}

    def field(self) -> str | None:
        """The field that is the whole reply; None where the action is read from JSON.

        Raises:
            OpenEnvError: the schema has no field that a reply could fill.
        """
        properties, asked = self._open(), self._asked()
        if self.only is not None:
            if self.only not in properties:
                raise OpenEnvError(f"args.action_field = {self.only!r} is no field of the action; it has {', '.join(properties)}")
            return self.only
        if not asked:
            raise OpenEnvError("the server's action has no field that a reply could fill; see its /schema")
        if self._open().get("type", {}).get("const") == "call_tool":
            return None  # of an MCP environment, whose arguments count as optional
        required = [name for name in asked if name in self.schema.get("required", ())]
        texts = [name for name in asked if _is_text(asked[name])]
        candidates = required or texts or list(asked)
        return candidates[0] if len(candidates) == 1 and not _is_object(asked[candidates[0]]) else None

    def form(self) -> str:
        """What to reply, in words for the policy."""
        single = self.field()
        if single is not None:
            return f"Reply with {_kind(self._open()[single])} for {single} and nothing else."
        asked, required = self._asked(), self.schema.get("required", ())
        fields = (f"{name} ({_kind(one)}{'' if name in required else ', optional'})" for name, one in asked.items())
        return f"Reply with one JSON object with the fields {', '.join(fields)}."

    def fault(self, errors: Sequence[Any]) -> str | None:
        """What the server's validation found wrong, in words for the policy; None where it is not about the action."""
        words: list[str] = []
        for error in errors:
            place = error.get("loc") if isinstance(error, dict) else None
            if not (
                isinstance(place, list) and (not place or place[0] in self._open() or error.get("type") == "extra_forbidden")
            ):
                return None
            words.append(f"{'.'.join(map(str, place)) or 'action'}: {error.get('msg')}")
        return f"The reply is no action that the environment takes: {'; '.join(words[:3])}. {self.form()}" if words else None

    def _open(self) -> dict[str, Any]:
        return {name: one for name, one in _properties(self.schema).items() if name != "metadata"}

    def _asked(self) -> dict[str, Any]:
        return {name: one for name, one in self._open().items() if "const" not in one and name not in self.fixed}

    def _value(self, name: str, reply: str) -> Any:
        if _is_text(self._open()[name]):
            return reply
        try:
            return json.loads(reply)
        except (ValueError, RecursionError):
            return reply.strip()  # the server says what it wants instead


def _object_in(reply: str, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first JSON object in a reply that has one of the fields that are asked for."""
    decoder, start = json.JSONDecoder(), -1
    for _ in range(MAX_BRACES):
        start = reply.find("{", start + 1)
        if start < 0:
            return None
        try:
            value, _end = decoder.raw_decode(reply, start)
        except (ValueError, RecursionError):
            continue
        if set(value) & set(asked):
            return value
    return None


def _properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    return dict(schema.get("properties", {}))


def _is_text(schema: Mapping[str, Any]) -> bool:
    return schema.get("type") == "string" or any(_is_text(one) for one in schema.get("anyOf", ()))


def _is_object(schema: Mapping[str, Any]) -> bool:
    return schema.get("type") == "object"


def _kind(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    names = {"string": "text", "integer": "a whole number", "number": "a number", "boolean": "true or false", "array": "a list"}
    return names.get(str(schema.get("type")), "JSON")


def _short(value: object) -> str:
    text = repr(value)
    return f"{text[:SHOWN_CHARACTERS]}..." if len(text) > SHOWN_CHARACTERS else text
