"""From an observation to text, by its space."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from turnwise.adapters.answers import bounded_text

MOST_NUMBERS = 1024  # more are an image or a field of sensors, of which text says nothing to a language model
VECTORS = (spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)


class Describer:
    """Text of the observations of one environment.

    Text stays as it is. Of numbers, a `Discrete` observation is its name or number; `Box`, `MultiDiscrete`, `MultiBinary` and
    `Tuple` are their parts, a line each where they have names and else with commas between, a row a line where there are two
    dimensions; a `Dict` is a line an entry.
    """

    def __init__(self, space: spaces.Space[Any], *, template: str | None, names: Sequence[str] | None, source: str) -> None:
        """Set up.

        Args:
            space: of the observations.
            template: filled in by `str.format`: `{0}`, `{1}` are the parts (of a `Discrete`, `{0}` its name or number), `{key}`
                those of a `Dict`, `{text}` what would stand there without a template.
            names: of the values of a `Discrete`, or of the parts of a vector or `Tuple`.
            source: the environment's id, for messages.

        Raises:
            ValueError: for an observation space that text cannot say, or a template or names that do not fit.
        """
        self.space, self.template, self.source = space, template, source
        self.names = None if names is None else tuple(map(str, names))
        self._check_space(space)
        self._check_names(names)
        if template is not None and not isinstance(space, spaces.Text):
            self._check_template()

    def __call__(self, observation: Any) -> str:
        """The text of one observation.

        Raises:
            ValueError: for an observation that is not of the space, or too long.
        """
        what = f"the observation of gymnasium:{self.source}"
        if isinstance(observation, str) or not isinstance(self.space, (*VECTORS, spaces.Discrete, spaces.Tuple, spaces.Dict)):
            return bounded_text(observation, what=what)
        try:
            text = self._fill(observation)
        except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{what} is {str(observation)[:80]!r}, which is not of its space {self.space}: {error}") from error
        return bounded_text(text, what=what)

    def _fill(self, observation: Any) -> str:
        text = _describe(self.space, observation, self.names)
        if self.template is None:
            return text
        if isinstance(self.space, spaces.Dict):
            return self.template.format(**{**_entries(self.space, observation), "text": text})
        return self.template.format(*_parts(self.space, observation, self.names), text=text)

    def _check_space(self, space: spaces.Space[Any]) -> None:
        count = int(np.prod(space.shape)) if isinstance(space, VECTORS) else 0
        if count > MOST_NUMBERS:
            raise ValueError(
                f"gymnasium:{self.source} observes {count} numbers at once, more than the {MOST_NUMBERS} that are made "
                "text; wrap it in a gymnasium.ObservationWrapper that says what matters"
            )
        if isinstance(space, spaces.Graph | spaces.Sequence | spaces.OneOf):
            raise ValueError(
                f"gymnasium:{self.source} has the observation space {space}, of which no text is made; wrap it in a "
                "gymnasium.ObservationWrapper that returns text"
            )
        parts = space.spaces if isinstance(space, spaces.Tuple | spaces.Dict) else ()
        for part in parts.values() if isinstance(parts, Mapping) else parts:
            self._check_space(part)

    def _check_names(self, names: Sequence[str] | None) -> None:
        if names is None:
            return
        if isinstance(names, str):
            raise ValueError(f"args.observation_names = {names!r} must be a list of names")
        wanted = _size(self.space)
        if wanted is None:
            raise ValueError(f"args.observation_names does not fit the observations of gymnasium:{self.source}, {self.space}")
        if len(names) != wanted:
            raise ValueError(f"args.observation_names has {len(names)} names, but there are {wanted} to be given")

    def _check_template(self) -> None:
        try:
            self._fill(self.space.sample())
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"args.observation = {self.template!r} cannot be filled in with observations of {self.space}: {error!r}; "
                "parts are {0}, {1} and so on, those of a Dict have their keys, and {text} is all of it"
            ) from error


def _size(space: spaces.Space[Any]) -> int | None:
    """Values of a `Discrete`, else parts; None where names make no sense."""
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, VECTORS):
        return int(np.prod(space.shape))
    return len(space.spaces) if isinstance(space, spaces.Tuple) else None


def _describe(space: spaces.Space[Any], observation: Any, names: Sequence[str] | None = None) -> str:
    if isinstance(space, spaces.Dict):
        return "\n".join(f"{key}: {text}" for key, text in _entries(space, observation).items())
    if isinstance(space, VECTORS) and names is None and len(space.shape) > 1:
        rows = np.asarray(observation).reshape(-1, space.shape[-1]).tolist()
        return "\n".join(" ".join(map(_number, row)) for row in rows)
    texts = [part if isinstance(part, str) else _number(part) for part in _parts(space, observation, names)]
    if names is not None and not isinstance(space, spaces.Discrete):
        return "\n".join(f"{name}: {text}" for name, text in zip(names, texts, strict=True))
    return ", ".join(texts)


def _entries(space: spaces.Dict, observation: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a `Dict`: numbers as they are, so that a template may round them, and text of everything else."""
    return {
        key: _parts(part, observation[key])[0] if isinstance(part, spaces.Discrete) else _describe(part, observation[key])
        for key, part in space.spaces.items()
    }


def _parts(space: spaces.Space[Any], observation: Any, names: Sequence[str] | None = None) -> list[Any]:
    """Numbers as Python's own, text of what is no number."""
    if isinstance(space, spaces.Discrete):
        value = int(observation)
        return [value if names is None else names[value - int(space.start)]]
    if isinstance(space, VECTORS):
        return np.asarray(observation, dtype=space.dtype).reshape(space.shape).ravel().tolist()
    if isinstance(space, spaces.Tuple):
        pairs = zip(space.spaces, observation, strict=True)
        return [_parts(part, value)[0] if isinstance(part, spaces.Discrete) else _describe(part, value) for part, value in pairs]
    return [bounded_text(observation, what="a part of an observation")]


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
