"""What can be said of an environment without playing it: arguments, sizes of its splits, tools, reward components."""

import inspect
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from queue import Empty, Queue
from typing import Any

from turnwise.envs.base import TextEnv
from turnwise.envs.docstrings import read_docstring
from turnwise.envs.messages import Tool
from turnwise.envs.registry import Registration, find, load, make

SPLITS = ("train", "validation")  # those that every environment has
TIMEOUT_S = 20.0  # to read the tasks of a split; a large file takes seconds
MODULE_PREFIXES = re.compile(r"\b(?:collections\.abc|pathlib|typing|[a-z_]\w*(?:\.\w+)+)\.(?=[A-Z])")


@dataclass(frozen=True)
class Argument:
    """An argument of an environment, as `args` of a config names it."""

    name: str
    annotation: str
    required: bool
    default: Any
    text: str
    """What its docstring says."""


@dataclass(frozen=True)
class Split:
    """A split: how many tasks it has or, where they cannot be read, why."""

    name: str
    size: int | None
    problem: str = ""


@dataclass(frozen=True)
class Description:
    """An environment. One that cannot be imported or made has a `problem`, and what could be found out all the same."""

    id: str
    target: str
    """`package.module:Class`."""

    text: str = ""
    """First paragraph of the class's docstring."""

    problem: str = ""
    arguments: tuple[Argument, ...] = ()
    splits: tuple[Split, ...] = ()
    max_turns: int | None = None
    tools: tuple[Tool, ...] = ()
    components: tuple[str, ...] = ()
    outcome_components: tuple[str, ...] = ()
    uses_containers: bool = False


def describe(env_id: str, args: Mapping[str, Any] | None = None, *, timeout_s: float = TIMEOUT_S) -> Description:
    """Describe an environment. What somebody else's class raises is told in the description.

    Args:
        env_id: a registered name, `package.module:Class`, or `SCHEME:NAME`.
        args: arguments of the environment.
        timeout_s: seconds that reading the tasks of a split may take.

    Raises:
        ValueError: for an unknown name.
    """
    registration = find(env_id)
    try:
        cls = load(env_id)
    except Exception as error:  # a module may raise anything while it is imported
        return Description(env_id, registration.target, registration.description or "", problem=_told(error))
    told: dict[str, Any] = {
        "text": registration.description or read_docstring(inspect.getdoc(cls) or "")[0],
        "arguments": _arguments(cls, registration),
        "uses_containers": cls.uses_containers,
    }
    try:
        env = make(env_id, args)
    except Exception as error:  # as may a constructor
        return Description(env_id, registration.target, **told, **_offered(cls), problem=_told(error))
    try:
        splits = tuple(_split(env, name, timeout_s) for name in SPLITS)
        return Description(env_id, registration.target, **told, **_offered(env), splits=splits, max_turns=env.max_turns)
    finally:
        env.close()


def _offered(env: TextEnv | type[TextEnv]) -> dict[str, Any]:
    components = tuple(sorted(env.component_names | env.outcome_components))
    outcome = tuple(sorted(env.outcome_components))
    return {"tools": env.tools, "components": components, "outcome_components": outcome}


def _split(env: TextEnv, name: str, timeout_s: float) -> Split:
    outcome: Queue[Split] = Queue()

    def count() -> None:
        try:
            outcome.put(Split(name, len(env.tasks(name))))
        except Exception as error:
            outcome.put(Split(name, None, _told(error)))

    threading.Thread(target=count, name="describe-env", daemon=True).start()
    try:
        return outcome.get(timeout=timeout_s)
    except Empty:
        return Split(name, None, f"its tasks are not read within {timeout_s:g} s")


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _arguments(cls: type[TextEnv], registration: Registration) -> tuple[Argument, ...]:
    signature = inspect.signature(cls)
    texts = read_docstring(inspect.getdoc(cls) or "")[1] | read_docstring(inspect.getdoc(cls.__init__) or "")[1]
    return tuple(
        _argument(parameter, registration.defaults.get(name, parameter.default), texts.get(name, ""))
        for name, parameter in signature.parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    )


def _argument(parameter: inspect.Parameter, default: Any, text: str) -> Argument:
    empty, annotation = inspect.Parameter.empty, parameter.annotation
    if not isinstance(annotation, str):  # one that its module left as text stays as it is written there
        annotation = "" if annotation is empty else inspect.formatannotation(annotation)
    required = default is empty
    return Argument(parameter.name, MODULE_PREFIXES.sub("", annotation), required, None if required else default, text)
