"""Configuration files: reading and writing TOML, and merging tables."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turnwise.config.root import RLConfig

Tables = dict[str, Any]


class ConfigError(Exception):
    """The configuration cannot be used. The message is complete: it is printed as it stands, without a traceback."""


def load_config(path: Path) -> RLConfig:
    """Read a resolved configuration, as the processes of a run do.

    Raises:
        ConfigError: the file is missing or not TOML.
        pydantic.ValidationError: it does not fit the tables.
    """
    return RLConfig.model_validate(read_toml(path))


def read_toml(path: Path) -> Tables:
    """Raises ConfigError naming the file, and where it stops being TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (looked from {Path.cwd()})") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def dump_toml(config: RLConfig) -> str:
    """The configuration as TOML that `load_config` reads back. Unset keys are left out where unset is their default."""
    import tomli_w

    return tomli_w.dumps(to_tables(config))


def to_tables(config: RLConfig) -> Tables:
    """Plain tables of a configuration: paths as text, None left out or, where None differs from the default, as "None"."""
    plain = config.model_dump(mode="json")
    default = RLConfig().model_dump(mode="json")
    return _without_none(plain, default)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Tables:
    """Deep merge: tables key by key, everything else (lists too) replaced by `over`."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _without_none(plain: Tables, default: Mapping[str, Any]) -> Tables:
    kept: Tables = {}
    for key, value in plain.items():
        ground = default.get(key)
        if value is None:
            if ground is not None:
                kept[key] = "None"
        elif isinstance(value, dict):
            kept[key] = _without_none(value, ground if isinstance(ground, dict) else {})
        elif isinstance(value, list):
            kept[key] = [_without_none(item, {}) if isinstance(item, dict) else item for item in value]
        else:
            kept[key] = value
    return kept
