"""turnwise.monitor."""
