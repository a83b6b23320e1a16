"""Names of new environments: what Python, turnwise and other packages leave free."""

import builtins
import importlib.util
import keyword
import re

from turnwise.config import ConfigError
from turnwise.envs.registry import ADAPTERS, find, names

MAX_CHARACTERS = 40  # longer ones would break the lines of the templates
FORM = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)*")
IMPORTED = {
    "Any",
    "Done",
    "Mapping",
    "Sequence",
    "Step",
    "Task",
    "TextEnv",
    "ToolCall",
    "ToolEnv",
    "ToolError",
    "AssistantMessage",
}


def check_name(name: str) -> None:
    """Refuse a name that cannot be both a Python package and an environment.

    Raises:
        ConfigError: naming the rule, and where there is one a name that would do.
    """
    if not FORM.fullmatch(name) or len(name) > MAX_CHARACTERS:
        meant = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")[:MAX_CHARACTERS]
        hint = f"; {meant} would do" if FORM.fullmatch(meant) and _taken(meant) is None else ""
        raise ConfigError(
            f"NAME = {name!r} must be at most {MAX_CHARACTERS} small letters and digits, with single '_' "
            f"between them, beginning with a letter{hint}."
        )
    taken = _taken(name)
    if taken is not None:
        raise ConfigError(f"NAME = {name!r} {taken}; choose another name.")


def class_name(name: str) -> str:
    """`my_game` -> `MyGame`; where that name is another class of the module or Python's own, `MyGameGame`."""
    camel = "".join(part.capitalize() for part in name.split("_"))
    hidden = camel in IMPORTED or hasattr(builtins, camel) or keyword.iskeyword(camel)
    return f"{camel}Game" if hidden else camel


def _taken(name: str) -> str | None:
    if keyword.iskeyword(name):
        return "is a keyword of Python"
    if name in names():
        return f"is taken: it stands for {find(name).target}"
    if name in ADAPTERS:
        return f"is taken: ids {name}:NAME are those of an adapter"
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:  # a folder without __init__.py is nobody's package
        return f"is taken: Python imports {spec.origin} by it"
    return None
