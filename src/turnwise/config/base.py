"""The base of every configuration table: unknown keys are refused, values are frozen, docstrings are the help."""

from pydantic import ConfigDict
from pydantic_config import BaseConfig


class Config(BaseConfig):
    """One TOML table. The docstring under a field is its `--help` text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)
