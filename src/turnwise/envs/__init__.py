"""Environments: text in, text out. `make("wordle")` makes one, `register` adds one, `registered` lists them."""

from turnwise.envs.base import FreeText, Step, Task, TextEnv
from turnwise.envs.registry import load, make, register, registered

__all__ = ["FreeText", "Step", "Task", "TextEnv", "load", "make", "register", "registered"]
