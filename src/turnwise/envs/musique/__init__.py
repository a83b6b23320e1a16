"""MuSiQue: questions that take two to four paragraphs to answer, with tools to search and read."""

from turnwise.envs.musique.env import MuSiQue

__all__ = ["MuSiQue"]
