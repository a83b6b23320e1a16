"""Names of environments: ours, those registered in code, those of installed packages, `package.module:Class`, and `SCHEME:NAME`
for an environment of another framework, which an adapter makes one of ours."""

import importlib
import inspect
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from turnwise.envs.base import TextEnv
from turnwise.envs.suggest import did_you_mean

ENTRY_POINT_GROUP = "turnwise.envs"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Registration:
    """One name."""

    target: str  # "package.module:Class"
    description: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict[str, Any])


_REGISTRATIONS: dict[str, Registration] = {}
ADAPTERS: dict[str, str] = {  # scheme -> class of `turnwise.adapters`, whose argument `source` is what follows the colon
    "gymnasium": "turnwise.adapters.gymnasium_env:GymnasiumEnv",
    "openenv": "turnwise.adapters.openenv.env:OpenEnv",
    "textarena": "turnwise.adapters.textarena:TextArena",
    "reasoning_gym": "turnwise.adapters.reasoning_gym:ReasoningGym",
    "verifiers": "turnwise.adapters.verifiers:Verifiers",
}


def register(name: str, target: str, *, description: str | None = None, **defaults: Any) -> None:
    """Give an environment class a name, here and as `turnwise/<name>` in gymnasium.

    Args:
        name: what configs and `make` say.
        target: `"package.module:Class"`; imported when it is first made.
        description: one line for `registered()`; the first line of the class's docstring when not given.
        defaults: arguments of the environment that `make` does not give.

    Raises:
        ValueError: for a malformed name or target, or a name that stands for another class.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"environment name {name!r} must be letters, digits, '_', '-' and '.', beginning with none of the last two"
        )
    if not _is_target(target):
        raise ValueError(f"target {target!r} of environment {name!r} must have the form 'package.module:Class'")
    new = Registration(target, description, defaults)
    old = _REGISTRATIONS.get(name)
    if old is not None and (old.target, old.defaults) != (new.target, new.defaults):
        raise ValueError(f"environment {name!r} already stands for {old.target}; choose another name for {target}")
    _REGISTRATIONS[name] = new
    gymnasium_id = f"turnwise/{name}"
    if gymnasium_id not in gymnasium.registry:
        gymnasium.register(gymnasium_id, entry_point=target, kwargs=dict(defaults))


def names() -> list[str]:
    """Every known name, sorted; no environment is imported."""
    _register_installed()
    return sorted(_REGISTRATIONS)


def registered() -> dict[str, str]:
    """Every known name with its one-line description, sorted. A class that cannot be imported says so in its place."""
    return {name: _describe(_REGISTRATIONS[name]) for name in names()}


def adapters() -> dict[str, str]:
    """The schemes of ids `SCHEME:NAME`, each with the first line of its class's docstring."""
    return {scheme: _describe(Registration(ADAPTERS[scheme])) for scheme in sorted(ADAPTERS)}


def load(env_id: str) -> type[TextEnv]:
    """The class behind a registered name or `package.module:Class`.

    Raises:
        ValueError: for an unknown name, or a class that cannot be imported or is no `TextEnv`; it says which and what is known.
    """
    return _import(find(env_id).target)


def make(env_id: str, args: Mapping[str, Any] | None = None) -> TextEnv:
    """Make an environment.

    Args:
        env_id: a registered name, `package.module:Class`, or `SCHEME:NAME`.
        args: keyword arguments of the environment.

    Raises:
        ValueError: for an unknown id (see `load`), an argument that the environment does not have, or a bad value.
    """
    registration = find(env_id)
    cls = _import(registration.target)
    kwargs = {**registration.defaults, **(args or {})}
    _check_args(env_id, cls, kwargs)
    try:
        env = cls(**kwargs)
    except TypeError as error:  # a value of the wrong type, or a name that only the constructor could judge
        raise ValueError(f"environment {env_id!r} cannot be made with args {kwargs}: {error}") from error
    name = env_id if NAME.fullmatch(env_id) else cls.__name__
    env.spec = EnvSpec(id=f"turnwise/{name}", entry_point=registration.target, kwargs=kwargs)
    return env


def find(env_id: str) -> Registration:
    """What an id stands for; nothing is imported. Raises ValueError for an unknown name, with the known ones."""
    scheme, colon, source = env_id.partition(":")
    if colon and scheme in ADAPTERS:
        return Registration(ADAPTERS[scheme], defaults={"source": source})
    if _is_target(env_id):
        return Registration(env_id)
    if env_id not in _REGISTRATIONS:
        _register_installed()
    if env_id not in _REGISTRATIONS:
        known = ", ".join(sorted(_REGISTRATIONS))
        hint = did_you_mean(env_id, _REGISTRATIONS)
        raise ValueError(f"unknown environment {env_id!r}.{hint} Known: {known}; or give 'package.module:Class'.")
    return _REGISTRATIONS[env_id]


def _is_target(text: str) -> bool:
    module, colon, name = text.partition(":")
    return bool(colon) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _import(target: str) -> type[TextEnv]:
    module_name, _, class_name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"environment {target}: module {module_name!r} cannot be imported: {error}") from error
    cls = getattr(module, class_name, None)
    if cls is None:
        raise ValueError(
            f"environment {target}: module {module_name!r} has no {class_name!r}.{did_you_mean(class_name, dir(module))}"
        )
    if not (isinstance(cls, type) and issubclass(cls, TextEnv)):
        raise ValueError(f"environment {target}: {class_name!r} is not a subclass of turnwise.envs.TextEnv")
    return cls


def _check_args(env_id: str, cls: type[TextEnv], args: Mapping[str, Any]) -> None:
    parameters = inspect.signature(cls).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    accepted = [parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY]
    listing = f"{env_id} takes {', '.join(accepted) or 'no arguments'}."
    for name in args:
        if name not in accepted:
            raise ValueError(f"args.{name} is not an argument of environment {env_id!r}.{did_you_mean(name, accepted)} {listing}")
    missing = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL and p.name not in args]
    if missing:
        raise ValueError(f"environment {env_id!r} needs args.{', args.'.join(missing)}. {listing}")


def _describe(registration: Registration) -> str:
    if registration.description is not None:
        return registration.description
    try:
        return (inspect.getdoc(_import(registration.target)) or "").partition("\n")[0]
    except Exception as error:  # somebody else's module may raise anything while it is imported
        return f"(unusable: {error})"


@cache
def _register_installed() -> None:
    """Register what installed packages offer; a name already taken keeps its meaning."""
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in _REGISTRATIONS:
            continue
        try:
            register(point.name, point.value)
        except ValueError as error:  # somebody else's package: say so, and let ours work
            warnings.warn(f"entry point {point.name!r} of group {ENTRY_POINT_GROUP} is left out: {error}", stacklevel=2)


register("wordle", "turnwise.envs.wordle:Wordle")
register("gsm8k", "turnwise.envs.gsm8k:GSM8K")
register("musique", "turnwise.envs.musique:MuSiQue")
register("mlgym", "turnwise.envs.mlgym:MLGym")
