"""What several subcommands of `turnwise` take."""

import argparse
import json
from collections.abc import Callable, Sequence

from turnwise.config import ConfigError
from turnwise.config.files import Tables

AddCommand = Callable[..., argparse.ArgumentParser]
"""`add_parser` of the subcommands: name and help, to the parser of one."""


def env_arguments(args: Sequence[str]) -> Tables:
    """`--max-guesses 8 --answers '["frost"]'` -> arguments of an environment; values are JSON where they read as JSON.

    Raises:
        ConfigError: the line is not a row of `--name value`.
    """
    found: Tables = {}
    tokens = iter(args)
    for token in tokens:
        if not token.startswith("--"):
            raise ConfigError(f"{token}: arguments of the environment are given as --name value")
        name, equals, text = token[2:].partition("=")
        value = text if equals else next(tokens, None)
        if value is None:
            raise ConfigError(f"{token} needs a value")
        try:
            found[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            found[name.replace("-", "_")] = value
    return found
