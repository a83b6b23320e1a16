"""Two environments of OpenEnv, written with their base classes and served by their application: `openenv_game.py PORT [sums]`.

Find a number from 0 to 9. Some guesses are faults of the server: 13 hangs, 66 has NaN for a reward, 77 has a very long
observation, 88 raises, and 99 ends the process.
"""

import os
import sys
import time
from random import Random
from typing import Any

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State
from pydantic import field_validator


class Guess(Action):
    number: int

    @field_validator("number")
    @classmethod
    def not_below_zero(cls, number: int) -> int:
        if number < 0:
            raise ValueError("must not be below 0")
        return number


class Hint(Observation):
    hint: str
    tries: int


class Game(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self.target, self.tries = 0, 0

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_more: Any) -> Hint:
        self.target, self.tries = Random(seed).randrange(10), 0
        return Hint(hint="A number from 0 to 9.", tries=0)

    def step(self, action: Guess, timeout_s: float | None = None, **_more: Any) -> Hint:
        self.tries += 1
        if action.number == 13:
            time.sleep(3)
        if action.number == 88:
            raise RuntimeError("the dice fell off the table")
        if action.number == 99:
            os._exit(7)
        if action.number == 66:
            return Hint(hint="nan", tries=self.tries, reward=float("nan"), done=True)
        hint = "x" * 60_000 if action.number == 77 else "higher" if action.number < self.target else "lower"
        won = action.number == self.target
        return Hint(hint="Yes." if won else hint, tries=self.tries, reward=1.0 if won else None, done=won)

    @property
    def state(self) -> State:
        return State(step_count=self.tries)


class Sums(MCPEnvironment):
    """Find the sum with a tool; the tool `hand_in` ends the episode."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        server = FastMCP("sums")
        self.handed_in: int | None = None

        @server.tool
        def add(one: int, other: int) -> int:
            """Add two numbers."""
            return one + other

        @server.tool
        def hand_in(number: int) -> str:
            """Hand in the sum."""
            self.handed_in = number
            return "Thank you."

        super().__init__(server)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_more: Any) -> Observation:
        self.handed_in = None
        return Observation(metadata={"question": "What is 20 + 22?"})

    def step(self, action: Action, timeout_s: float | None = None, **more: Any) -> Observation:
        return self._judged(super().step(action, timeout_s=timeout_s, **more))

    async def step_async(self, action: Action, timeout_s: float | None = None, **more: Any) -> Observation:
        return self._judged(await super().step_async(action, timeout_s=timeout_s, **more))

    def _judged(self, observation: Observation) -> Observation:
        if self.handed_in is not None:
            observation.done, observation.reward = True, float(self.handed_in == 42)
        return observation

    def _step_impl(self, action: Action, timeout_s: float | None = None, **_more: Any) -> Observation:
        raise RuntimeError(f"{action!r} is no call")

    @property
    def state(self) -> State:
        return State()


def app(name: str) -> Any:
    if name == "sums":
        return create_fastapi_app(Sums, CallToolAction, CallToolObservation, max_concurrent_envs=2, env_name=name)
    return create_fastapi_app(Game, Guess, Hint, max_concurrent_envs=2, env_name=name)


if __name__ == "__main__":
    uvicorn.run(app((*sys.argv, "guess")[2]), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
