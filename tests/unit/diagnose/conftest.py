"""Shapes and types in the signatures of what measures, and of what it measures, hold at every call in tests."""

from jaxtyping import install_import_hook

with install_import_hook(["turnwise.trainer", "turnwise.diagnose.probing"], "beartype.beartype"):
    from turnwise.diagnose import probe  # noqa: F401  # it imports the rest
    from turnwise.trainer import loop  # noqa: F401
