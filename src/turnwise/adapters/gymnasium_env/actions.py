"""From a reply to an action: one of the names of a discrete space, or the reply itself."""

import re
from collections.abc import Sequence
from typing import Any

from gymnasium import spaces

VECTORS = (spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)
NESTED = (spaces.Tuple, spaces.Dict, spaces.Graph, spaces.Sequence, spaces.OneOf)


class ActionNames:
    """The actions of a `Discrete` space by name, in the order of their numbers."""

    def __init__(self, space: spaces.Discrete, names: Sequence[str] | None) -> None:
        """Set up.

        Args:
            space: of the actions.
            names: one for each; the numbers themselves when None.

        Raises:
            ValueError: when there are more or fewer names than actions, or two that cannot be told apart.
        """
        first, count = int(space.start), int(space.n)
        if isinstance(names, str):
            raise ValueError(f"args.actions = {names!r} must be a list of {count} names")
        given = range(first, first + count) if names is None else names
        self.names = tuple(" ".join(str(name).split()) for name in given)
        if len(self.names) != count:
            raise ValueError(f"args.actions has {len(self.names)} names, but the environment has {count} actions")
        if "" in self.names:
            raise ValueError(f"args.actions = {names!r} holds an empty name")
        twins = {name for name in self.names if [other.casefold() for other in self.names].count(name.casefold()) > 1}
        if twins:
            raise ValueError(f"args.actions names {', '.join(sorted(twins))} twice; upper and lower case are not told apart")
        self._actions = {name.casefold(): space.dtype.type(first + k) for k, name in enumerate(self.names)}
        longest_first = sorted(self.names, key=len, reverse=True)  # of two names that begin alike the longer one is meant
        self._pattern = re.compile("|".join(_whole(name) for name in longest_first), re.IGNORECASE)

    def read(self, reply: str) -> Any:
        """The action (of the space's own type) whose name comes first in `reply` as a whole word, or None where there is none."""
        found = self._pattern.search(reply)
        return None if found is None else self._actions.get(" ".join(found.group().split()).casefold())

    @property
    def listing(self) -> str:
        return ", ".join(self.names)


def read_action_space(space: spaces.Space[Any], names: Sequence[str] | None, *, source: str) -> ActionNames | None:
    """How replies become actions: by name, or (None) as they are, where actions are text.

    Raises:
        ValueError: for a space of numbers that is not discrete, or names that do not fit.
    """
    if isinstance(space, spaces.Discrete):
        return ActionNames(space, names)
    if isinstance(space, VECTORS + NESTED):
        raise ValueError(
            f"gymnasium:{source} has the action space {space}, which has no names of actions and is not supported; wrap the "
            "environment in a gymnasium.ActionWrapper with a Discrete or Text action space, and register that"
        )
    if names is not None:
        raise ValueError(f"args.actions names actions, but those of gymnasium:{source} are text: leave it out")
    return None


def _whole(name: str) -> str:
    """A pattern that finds `name` as a whole word. A number is no part of a longer one: 0 is not in -0, 0.5 or 10."""
    text = r"\s+".join(re.escape(word) for word in name.split())
    return rf"(?<![\w.-]){text}(?![\w-]|\.\d)" if name.isdecimal() else rf"(?<!\w){text}(?!\w)"
