"""Environments of `gymnasium.make`: those of text as they are, those of numbers through a wrapper of text."""

from turnwise.adapters.gymnasium_env.env import GymnasiumEnv

__all__ = ["GymnasiumEnv"]
