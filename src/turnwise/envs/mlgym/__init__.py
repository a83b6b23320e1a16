"""Machine-learning tasks in containers."""

from turnwise.envs.mlgym.env import MLGym

__all__ = ["MLGym"]
