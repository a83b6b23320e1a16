"""turnwise.inference."""
