"""MLGym for a model that writes no words."""

from turnwise.envs.base import Step
from turnwise.envs.mlgym import MLGym

COMMANDS = ("python3 baseline.py", "ls no-such-file", "validate", "submit")
ID = f"{__name__}:MLGymByBytes"


class MLGymByBytes(MLGym):
    """Reads any reply as one of four commands, by the sum of its bytes."""

    def step(self, action: str) -> Step:
        return super().step(f"```\n{COMMANDS[sum(action.encode()) % len(COMMANDS)]}\n```")
