"""A game of OpenEnv, written with their base classes and served by their application: `openenv_game.py PORT`.

Find a number from 0 to 9. Some guesses are faults of the server: 13 hangs, 66 has NaN for a reward, 77 has a very long
observation, 88 raises, and 99 ends the process.
"""

import os
import sys
import time
from random import Random
from typing import Any

import uvicorn
from openenv.core.env_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
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


if __name__ == "__main__":
    uvicorn.run(
        create_fastapi_app(Game, Guess, Hint, max_concurrent_envs=2, env_name="guess"),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        log_level="warning",
    )
