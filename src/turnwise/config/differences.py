"""What one configuration says otherwise than another, key by key."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from turnwise.config.files import Tables, to_tables
from turnwise.config.root import RLConfig

UNSET = "unset"


@dataclass(frozen=True)
class Difference:
    """A key with its two values, as TOML writes them."""

    key: str  # dotted; `orchestrator.env[0].id` inside a list of tables
    before: str
    after: str
    given: bool  # whether the first value was given, and not a default

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.after}"


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Keys whose values differ, in the order of `before`, then of `after`. A key that one of them leaves out has its default."""
    one, other, default = leaves(before), leaves(after), leaves(to_tables(RLConfig()))
    # a table that is a value on one side ("None", or empty) is compared as a whole
    keys = [key for key in dict.fromkeys((*one, *other)) if not _inside(key, one) and not _inside(key, other)]
    found: list[Difference] = []
    for key in keys:
        first, second = _at(key, one), _at(key, other)
        ground = _at(key, default)
        texts = [shown(ground if value is None else value) for value in (first, second)]
        if texts[0] != texts[1]:
            found.append(Difference(key, texts[0], texts[1], given=first is not None))
    return found


def leaves(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and values of everything that is no table; lists of tables item by item."""
    found: dict[str, Any] = {}
    for name, value in tables.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            found |= leaves(cast(Tables, value), f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for index, item in enumerate(value):
                found |= leaves(item, f"{key}[{index}].")
        else:
            found[key] = value
    return found


def shown(value: Any) -> str:
    """A value as TOML writes it; what is not set as `unset`."""
    if value is None or value == "None":
        return UNSET
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{name} = {shown(inner)}" for name, inner in cast(Tables, value).items())
        return f"{{{pairs}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, cast(list[Any], value)))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _at(key: str, values: Mapping[str, Any]) -> Any:
    """The value of a key, or the table of what lies under it; None where there is neither."""
    if key in values:
        return values[key]
    return {name.removeprefix(f"{key}."): value for name, value in values.items() if name.startswith(f"{key}.")} or None


def _inside(key: str, values: Mapping[str, Any]) -> bool:
    """Whether something that holds the key is a value by itself."""
    return any(key.startswith((f"{outer}.", f"{outer}[")) for outer in values)
