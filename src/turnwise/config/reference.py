"""The tables and keys of the configuration, read from the models: what `rl --help` prints and docs/configuration.md holds.

python -m turnwise.config.reference > docs/configuration.md
"""

import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from turnwise.config.legacy import RENAMED
from turnwise.config.root import RLConfig
from turnwise.config.sweep import SweepConfig

INTRODUCTION = """\
# Configuration

A run is described by TOML files, `rl @ base.toml @ mine.toml`, merged from left to right: tables key by key, lists as a
whole. Flags beat files: every key is also a flag (`--orchestrator.batch-size 32`; kebab and snake case both work). A flag of
an optional table switches it on, `--no-wandb` or the value `None` switches it off. Lists of tables are given in a file, or as
JSON: `--orchestrator.env '[{"id": "wordle"}]'`. `--model @ model.toml` reads one table from a file. Paths are relative to
where you are.

Unknown keys and contradictions are refused before anything starts, all of them at once. What a run was really started with
stands in `outputs/config.toml`.

`rl --resume` takes that saved configuration and the flags that you give now, such as `--max-steps 200`; the `@` files then
only say where the run lies. `model.name`, `trainer.model.lora`, `trainer.model.quant` and `seed` cannot change any more.

This page is generated from the code: `make docs` writes it again."""


SWEEPS = """\
# Sweep files

`turnwise sweep @ FILE` reads files of its own, described in [sweeps.md](sweeps.md)."""


@dataclass(frozen=True)
class Key:
    """One key of a table."""

    name: str
    type: str
    default: str  # as TOML, "unset", or "required"
    description: str


@dataclass(frozen=True)
class TableReference:
    """One TOML table."""

    header: str  # "", "[orchestrator.sampling]", "[[orchestrator.env]]"
    path: str  # dotted, without brackets
    description: str
    keys: tuple[Key, ...]


def tables(model: type[BaseModel] = RLConfig, path: str = "", header: str = "", note: str = "") -> Iterator[TableReference]:
    """All tables, each before those inside it."""
    inner = {name: found for name, field in model.model_fields.items() if (found := _table_of(field))}
    keys = tuple(_key(name, field) for name, field in model.model_fields.items() if name not in inner)
    yield TableReference(header, path, " ".join(filter(None, [_first_line(model), note])), keys)
    for name, (table, many) in inner.items():
        deeper = f"{path}.{name}" if path else name
        brackets = f"[[{deeper}]]" if many else f"[{deeper}]"
        field = model.model_fields[name]
        yield from tables(table, deeper, brackets, " ".join(filter(None, [_one_line(field.description), _optional(field)])))


def markdown() -> str:
    """docs/configuration.md."""
    parts = [INTRODUCTION, *_sections(tables())]
    old = "\n".join(f"| `{before}` | `{after}` |" for before, after in RENAMED.items())
    parts.append(f"## Older spellings\n\nAccepted, with a notice.\n\n| older | now |\n|---|---|\n{old}")
    parts += [SWEEPS, *_sections(tables(SweepConfig))]
    return "\n\n".join(parts) + "\n"


def _sections(described: Iterable[TableReference]) -> list[str]:
    """A heading, a description and a table of keys for each table."""
    parts: list[str] = []
    for table in described:
        parts += [f"## `{table.header}`" if table.header else "## Top level", table.description]
        if table.keys:
            rows = "\n".join(
                f"| `{key.name}` | {_cell(key.type)} | {_cell(f'`{key.default}`')} | {_cell(key.description)} |"
                for key in table.keys
            )
            parts.append(f"| key | type | default | |\n|---|---|---|---|\n{rows}")
    return parts


def help_text(width: int | None = None) -> str:
    """All flags, grouped by table."""
    width = min(width or shutil.get_terminal_size((110, 24)).columns, 130)
    lines: list[str] = []
    for table in tables():
        lines += ["", f"{table.header or 'top level'}  {table.description}"]
        many = table.header.startswith("[[")
        for key in table.keys:
            flag = f"  {key.name}" if many else f"  --{f'{table.path}.{key.name}'.strip('.').replace('_', '-')}"
            text = f"{key.description} ({key.type}; {key.default})".strip()
            lines += _columns(flag, text, width)
    return "\n".join(lines[1:]) + "\n"


def _columns(flag: str, text: str, width: int, column: int = 44) -> list[str]:
    wrapped = textwrap.wrap(text, max(30, width - column)) or [""]
    indented = [" " * column + line for line in wrapped]
    return [flag, *indented] if len(flag) >= column else [flag.ljust(column) + wrapped[0], *indented[1:]]


def _key(name: str, field: FieldInfo) -> Key:
    return Key(name, _type_name(field.annotation), _default(field), _one_line(field.description))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return _toml(field.get_default(call_default_factory=True, validated_data={}))


def _toml(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, typing.cast(list[Any], value)))}]"
    if isinstance(value, Mapping):
        return "{}"
    return f"{value:g}" if isinstance(value, float) else str(value) if isinstance(value, int) else f'"{value}"'


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f'"{choice}"' for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments if argument is not type(None))
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is tuple:
        return f"{len(arguments)} x {_type_name(arguments[0])}"
    if origin is dict:
        return "table"
    names: dict[str, str] = {"int": "integer", "float": "number", "str": "text", "bool": "true or false", "Path": "path"}
    name = str(getattr(annotation, "__name__", annotation))
    return names.get(name, name)


def _table_of(field: FieldInfo) -> tuple[type[BaseModel], bool] | None:
    """The table that a field holds, and whether it is a list of them."""
    for candidate in (field.annotation, *typing.get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate, typing.get_origin(field.annotation) is list
    return None


def _optional(field: FieldInfo) -> str:
    """Whether a table that may be unset is there when nobody mentions it."""
    if type(None) not in typing.get_args(field.annotation):
        return ""
    return "Optional, unset by default." if field.default is None else "Optional, set by default."


def _first_line(model: type[BaseModel]) -> str:
    return _one_line((model.__doc__ or "").partition("\n\n")[0])


def _one_line(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
