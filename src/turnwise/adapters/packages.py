"""Packages that only some users have."""

import importlib
from types import ModuleType


def optional_package(name: str, *, extra: str) -> ModuleType:
    """Import `name`, which `turnwise[extra]` installs.

    Raises:
        ValueError: when it is missing or cannot be imported, naming the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"the package {name!r} cannot be imported ({error}); install it by: pip install 'turnwise[{extra}]'"
        ) from error
