"""Environments: text in, text out. `make("wordle")` makes one, `register` adds one, `registered` lists them."""

from turnwise.envs.base import FreeText, Outage, Step, Task, TextEnv
from turnwise.envs.registry import load, make, register, registered
from turnwise.envs.shared_text import share_texts
from turnwise.envs.tool_env import ToolEnv
from turnwise.envs.tools import Done, ToolError, tool

__all__ = [
    "Done",
    "FreeText",
    "Outage",
    "Step",
    "Task",
    "TextEnv",
    "ToolEnv",
    "ToolError",
    "load",
    "make",
    "register",
    "registered",
    "tool",
]

share_texts()
