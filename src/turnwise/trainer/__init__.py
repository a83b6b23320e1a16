"""turnwise.trainer."""
