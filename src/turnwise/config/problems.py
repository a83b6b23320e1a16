"""Everything that is wrong with a configuration, each as one sentence: key, value, file, rule, remedy."""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from turnwise.config.root import RLConfig

Location = tuple[str | int, ...]

SENTENCES: Mapping[str, str] = {
    "missing": "is not set, and has no default; set it",
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text: put it in quotes",
    "string_pattern_mismatch": "must be of the form {pattern}",
    "too_short": "must have at least {min_length} entries",
    "list_type": "must be a list: put it in square brackets",
    "dict_type": "must be a table",
    "model_type": "must be a table: give its keys one by one",
    "path_type": "must be a path: put it in quotes",
    "literal_error": "must be one of {expected}",
}


@dataclass(frozen=True)
class Problem:
    """One thing to mend."""

    keys: tuple[str, ...]  # dotted; the first one is where the user looks
    text: str

    @property
    def key(self) -> str:
        return self.keys[0]


def dotted(location: Iterable[str | int]) -> str:
    """`("orchestrator", "env", 0, "id")` -> `orchestrator.env[0].id`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def from_pydantic(error: ErrorDetails, root: type[BaseModel] = RLConfig) -> Problem:
    """A validation error of a configuration, or of another file with tables `root`, in the words of this project."""
    location = error["loc"]
    key = dotted(location)
    if error["type"] == "extra_forbidden":
        return Problem((key,), f"{key}{_shown(error['input'])}: there is no such key; {_suggestion(location, root)}")
    if error["type"] == "missing":
        return Problem((key,), f"{key} {SENTENCES['missing']}.")
    template = SENTENCES.get(error["type"])
    words = template.format(**error.get("ctx", {})) if template else error["msg"][:1].lower() + error["msg"][1:]
    return Problem((key,), f"{key}{_shown(error['input'])} {words}{_nearest_choice(error)}.")


def fields_at(location: Location, root: type[BaseModel] = RLConfig) -> Mapping[str, Any] | None:
    """Fields of the table at `location` and their annotations, None where no table is."""
    model: type[BaseModel] | None = root
    for part in location:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part) if model else None
        model = _table_in(field.annotation) if field else None
    return {name: field.annotation for name, field in model.model_fields.items()} if model else None


def all_keys(model: type[BaseModel] = RLConfig, prefix: str = "") -> list[str]:
    """Dotted names of every key, tables included; `orchestrator.env.id` for keys of a list of tables."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        inner = _table_in(field.annotation)
        if inner:
            keys += all_keys(inner, f"{prefix}{name}.")
    return keys


def _table_in(annotation: Any) -> type[BaseModel] | None:
    """The table inside `T`, `T | None`, `list[T]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list):
        return next((inner for inner in map(_table_in, typing.get_args(annotation)) if inner), None)
    return None


def _suggestion(location: Location, root: type[BaseModel]) -> str:
    name, parents = str(location[-1]), location[:-1]
    siblings = list(fields_at(parents, root) or ())
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    keys = all_keys(root)
    elsewhere = [key for key in keys if key.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    distant = difflib.get_close_matches(name, [key.rpartition(".")[2] for key in keys], n=1, cutoff=0.75)
    if distant:
        return f"did you mean {next(key for key in keys if key.rpartition('.')[2] == distant[0])}?"
    table = f"[{dotted(parents)}]" if parents else "the top level"
    return f"{table} knows {', '.join(siblings)}." if siblings else "see docs/configuration.md."


def _nearest_choice(error: ErrorDetails) -> str:
    if error["type"] != "literal_error" or not isinstance(error["input"], str):
        return ""
    choices = [choice.strip("' ") for choice in error.get("ctx", {})["expected"].replace(" or ", ", ").split(",")]
    close = difflib.get_close_matches(error["input"], choices, n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _shown(value: Any) -> str:
    """` = value`, cut to what helps."""
    if isinstance(value, dict | BaseModel):
        return ""
    text = f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else repr(value)
    return f" = {text if len(text) <= 60 else text[:57] + '...'}"
