"""Environments of the library verifiers, of its API up to 0.3 and of that from 0.4 on: whichever is installed."""

from turnwise.adapters.verifiers.env import Verifiers

__all__ = ["Verifiers"]
