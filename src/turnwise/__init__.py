"""turnwise trains language-model agents by reinforcement learning in multi-turn environments."""

__version__ = "0.1.0"
