"""Checks of what happens before the trainer: the plan, text and tokens, the environment, rewards, advantages, masks."""
