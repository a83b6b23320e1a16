"""Wordle: a hidden word, six guesses, a mark a letter."""

from turnwise.envs.wordle.env import Wordle

__all__ = ["Wordle"]
