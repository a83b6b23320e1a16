"""From a command line (`@ a.toml @ b.toml --flags`) to a checked configuration, remembering where each value came from."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self, cast

from pydantic import ConfigDict, ValidationError
from pydantic_config import ConfigFileError, cli
from pydantic_core import ErrorDetails

from turnwise.config import legacy
from turnwise.config.differences import differences
from turnwise.config.files import ConfigError, Tables, merge, read_toml
from turnwise.config.problems import Problem, dotted, fields_at, from_pydantic
from turnwise.config.root import RLConfig
from turnwise.config.rules import broken_rules

COMMAND_LINE = "command line"
NAMES = ("output_dir", "run_name", "trajectories_dir")  # every file may have its own: not worth a line


@dataclass(frozen=True)
class Request:
    """What a command line asks for, not yet checked."""

    tables: Tables  # files and flags merged
    flags: Tables  # the flags alone
    origin: Mapping[str, str]  # dotted key -> file, or "command line"
    notices: tuple[str, ...] = ()
    files: tuple[Path, ...] = field(default=())
    changes: tuple[str, ...] = ()  # lines about what a file makes of values that files before it give


def read_command(args: Sequence[str]) -> Request:
    """Read the files and flags of a command line.

    Raises:
        ConfigError: a file cannot be read, or the line cannot be parsed.
    """
    files, flags = split_files(args)
    tables: Tables = {}
    origin: dict[str, str] = {}
    renamed: dict[str, str] = {}
    changes: list[str] = []
    for prefix, path in files:
        content, old = legacy.upgrade(_nest(prefix, read_toml(path)))
        renamed.update(old)
        before, tables = tables, merge(tables, content)
        changes += _changes(path, before, tables)
        _remember(origin, content, str(path))
    overrides, old = _parse_flags(flags)
    renamed.update(old)
    _remember(origin, overrides, COMMAND_LINE)
    notices = (legacy.notice(renamed),) if renamed else ()
    return Request(merge(tables, overrides), overrides, origin, notices, tuple(path for _, path in files), tuple(changes))


def check(request: Request) -> RLConfig:
    """The configuration that was asked for.

    Raises:
        ConfigError: it is not valid; the message holds every problem that was found.
    """
    config, problems = _validate(request.tables)
    if problems or config is None:
        raise ConfigError(format_problems(problems, request.origin))
    return config


def format_problems(problems: Sequence[Problem], origin: Mapping[str, str]) -> str:
    """All problems in one message, each with the file that it came from."""
    count = "One problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{count} in the configuration:"]
    for problem in problems:
        places = dict.fromkeys(place for key in problem.keys if (place := _origin(key, origin)))
        lines.append(f"  - {problem.text}" + (f"  [{', '.join(places)}]" if places else ""))
    return "\n".join(lines)


def _changes(path: Path, before: Tables, after: Tables) -> list[str]:
    """What a file changes, where it is laid over others that say something else; silent about one that only adds."""
    found = [difference for difference in differences(before, after) if difference.key not in NAMES]
    if not any(difference.given for difference in found):
        return []
    return [f"{path} changes what the files before it say:", *(f"  {difference}" for difference in found)]


def _validate(tables: Tables) -> tuple[RLConfig | None, list[Problem]]:
    """Validate, and apply the rules between tables even where single values are wrong, so that all is said at once."""
    try:
        config = RLConfig.model_validate(_copy(tables))
        return config, broken_rules(config)
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems = list({problem.text: problem for problem in map(from_pydantic, details)}.values())
    wrong = {dotted(detail["loc"]) for detail in details}
    config = _sound_part(_copy(tables), details)
    rest = broken_rules(config) if config else []
    return None, problems + [problem for problem in rest if not _touches(problem, wrong)]


def _sound_part(tables: Tables, details: Sequence[ErrorDetails]) -> RLConfig | None:
    """The configuration without what is wrong with it, or None where nothing sound is left."""
    for _ in range(3):  # a second round where a dropped value was a required one, which takes its list item along
        for detail in sorted(details, key=lambda detail: str(detail["loc"]), reverse=True):
            _drop(tables, detail["loc"][:-1] if detail["type"] == "missing" else detail["loc"])
        try:
            return RLConfig.model_validate(_copy(tables))
        except ValidationError as error:
            details = error.errors(include_url=False)
    return None


def _touches(problem: Problem, wrong: Iterable[str]) -> bool:
    return any(_related(key, bad) for key in problem.keys for bad in wrong)


def split_files(args: Sequence[str]) -> tuple[list[tuple[str, Path]], list[str]]:
    """`@ file` and `--table @ file` taken out: (table prefix, path) in order, and the flags that remain."""
    files: list[tuple[str, Path]] = []
    flags: list[str] = []
    tokens = iter(args)
    for token in tokens:
        if not token.startswith("@"):
            flags.append(token)
            continue
        name = token[1:] or next(tokens, None)
        if name is None:
            raise ConfigError("@ must be followed by a TOML file")
        under_table = bool(flags) and flags[-1].startswith("--") and "=" not in flags[-1] and _is_table(flags[-1])
        prefix = flags.pop()[2:].replace("-", "_") if under_table else ""
        files.append((prefix, Path(name).expanduser()))
    return files, flags


def _is_table(flag: str) -> bool:
    return fields_at(tuple(flag[2:].replace("-", "_").split("."))) is not None


class _Parsed(Exception):
    """Carries the flags out of `cli`, which would otherwise validate them without the files."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables


class _Flags(RLConfig):
    model_config = ConfigDict(extra="allow")

    @classmethod
    def model_validate(cls, obj: Any, **_options: Any) -> Self:
        raise _Parsed(obj)


def _parse_flags(flags: Sequence[str]) -> tuple[Tables, dict[str, str]]:
    names, renamed = _canonical_flags(flags)
    try:
        _unreachable(cli(_Flags, args=names))
    except _Parsed as parsed:
        return parsed.tables, renamed
    except ConfigFileError as error:
        raise ConfigError(f"{error.message}. Files are given as `@ file.toml`; `--help` lists the flags.") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"A list or table on the command line is not JSON: {error}") from error


def _canonical_flags(flags: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Flags in kebab case under today's names; snake case and older names are accepted too."""
    names: list[str] = []
    renamed: dict[str, str] = {}
    for token in flags:
        if not token.startswith("--"):
            names.append(token)
            continue
        name, equals, value = token[2:].partition("=")
        old = name.replace("-", "_")
        new = legacy.upgrade_flag(old)
        if new != old:
            renamed[f"--{name}"] = f"--{new.replace('_', '-')}"
        names.append(f"--{new.replace('_', '-')}{equals}{value}")
    return names, renamed


def _unreachable(config: RLConfig) -> NoReturn:
    raise AssertionError(f"the parser validated by itself: {config}")


def _remember(origin: dict[str, str], tables: Mapping[str, Any], source: str, prefix: str = "") -> None:
    """Note the source of each value; the last one wins, a table belongs to the first that wrote in it."""
    for key, value in tables.items():
        if isinstance(value, Mapping):
            origin.setdefault(f"{prefix}{key}", source)
            _remember(origin, cast(Mapping[str, Any], value), source, f"{prefix}{key}.")
        else:
            origin[f"{prefix}{key}"] = source


def _origin(key: str, origin: Mapping[str, str]) -> str | None:
    """Where the key, or else something in it, or else the table or list that holds it, was written."""
    while key:
        if key in origin:
            return origin[key]
        if inside := next((name for name in origin if name.startswith(f"{key}.")), None):
            return origin[inside]
        key = key[: key.rindex("[")] if key.endswith("]") else key.rpartition(".")[0]
    return None


def _nest(prefix: str, tables: Tables) -> Tables:
    for part in reversed(prefix.split(".") if prefix else []):
        tables = {part: tables}
    return tables


def _copy(value: Any) -> Any:
    """A copy down to the leaves: validation replaces "None" in place."""
    if isinstance(value, Mapping):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def _drop(tables: Any, location: Iterable[str | int]) -> None:
    *parents, last = location
    for part in parents:
        tables = _item(tables, part)
    if isinstance(tables, dict):
        tables.pop(last, None)
    elif isinstance(tables, list) and isinstance(last, int) and last < len(tables):
        tables.pop(last)


def _item(tables: Any, part: str | int) -> Any:
    if isinstance(tables, dict):
        return tables.get(part)
    return tables[part] if isinstance(tables, list) and isinstance(part, int) and part < len(tables) else None


def _related(key: str, wrong: str) -> bool:
    return key == wrong or wrong.startswith((f"{key}.", f"{key}[")) or key.startswith((f"{wrong}.", f"{wrong}["))
