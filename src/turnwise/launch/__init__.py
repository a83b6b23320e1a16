"""turnwise.launch."""
