"""turnwise.envs."""
