"""Secrets kept out of what leaves the machine: values of secret-looking keys and variables, and credentials in text."""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

HIDDEN = "***"
SHORTEST = 8  # characters: a shorter value is too likely an ordinary word to be hunted for in text
SECRET_NAME = re.compile(
    r"(?:^|[_\-.])(?:api|access|private|auth|signing)?(?:keys?|token|authorization)$"
    r"|^(?:api|access|auth)[_\-]tokens$|access[_\-]?key|apikey|secret|password|passwd|credential",
    re.IGNORECASE,
)
"""Names of keys and of environment variables whose values are secret; `max_tokens` and `tokenizer` are none."""
IN_ADDRESS = re.compile(r"(?<=://)[^/\s@]+@")  # https://user:password@host
BEARER = re.compile(r"(?i)(\bbearer\s+)[\w.~+/=-]{8,}")
ISSUED = re.compile(r"\b(?:sk|hf|ghp|gho|ghs|glpat|xox[abp])[-_][A-Za-z0-9_-]{16,}")  # prefixes that services give their keys


class Redactor:
    """Replaces secrets by `***`.

    Args:
        tables: the configuration; text under secret-looking keys is secret wherever it shows up again.
        environ: the environment; so are values of secret-looking variables.
    """

    def __init__(self, tables: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        known = {value for name, value in environ.items() if is_secret_name(name)} | set(_secret_texts(tables))
        self._values = sorted((value for value in known if len(value) >= SHORTEST), key=len, reverse=True)

    def text(self, text: str) -> str:
        """The text without secrets."""
        for value in self._values:
            text = text.replace(value, HIDDEN)
        text = IN_ADDRESS.sub(f"{HIDDEN}@", text)
        return ISSUED.sub(HIDDEN, BEARER.sub(rf"\g<1>{HIDDEN}", text))

    def tables(self, value: Any, *, secret: bool = False) -> Any:
        """The same tables and lists, with secrets of all their texts replaced.

        Args:
            value: a table, a list, or a value in one.
            secret: all text in it is secret.
        """
        if isinstance(value, Mapping):
            given = cast(Mapping[str, Any], value)
            return {key: self.tables(item, secret=secret or is_secret_name(str(key))) for key, item in given.items()}
        if isinstance(value, list | tuple):
            return [self.tables(item, secret=secret) for item in value]
        if isinstance(value, str):
            return HIDDEN if secret else self.text(value)
        return value


def is_secret_name(name: str) -> bool:
    """Whether a key or an environment variable of this name holds a secret."""
    return SECRET_NAME.search(name) is not None


def _secret_texts(value: Any, *, secret: bool = False) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _secret_texts(item, secret=secret or is_secret_name(str(key)))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secret_texts(item, secret=secret)
    elif isinstance(value, str) and secret:
        yield value
