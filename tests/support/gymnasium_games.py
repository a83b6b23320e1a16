"""Gymnasium environments for tests, registered by the import of this module."""

from typing import Any

import gymnasium
from gymnasium import spaces


class Echo(gymnasium.Env[str, str]):
    """Text in and out: says what was said, pays its length, and ends at "stop"."""

    metadata: dict[str, Any] = {"render_modes": []}
    observation_space = spaces.Text(100)
    action_space = spaces.Text(100)
    system_prompt = "Say something."

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return f"Hello {self.np_random.integers(1 << 30)}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return action.upper(), float(len(action)), action == "stop", action == "cut", {}


class Odd(gymnasium.Env[Any, int]):
    """One action, and the observation and reward that its arguments say; it counts how often it was closed."""

    metadata: dict[str, Any] = {"render_modes": []}
    observation_space = spaces.Discrete(3)
    action_space = spaces.Discrete(1)
    closed = 0

    def __init__(self, observation: Any = 1, reward: Any = 0.0, broken: bool = False) -> None:
        self.observation, self.reward, self.broken = observation, reward, broken

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return 0, {}

    def step(self, action: int) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self.broken:
            raise OSError("the game crashed")
        return self.observation, self.reward, False, False, {}

    def close(self) -> None:
        type(self).closed += 1


for name, game in (("Echo-v0", Echo), ("Odd-v0", Odd)):
    if f"tests/{name}" not in gymnasium.registry:
        gymnasium.register(f"tests/{name}", entry_point=game)
