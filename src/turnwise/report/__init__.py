"""turnwise.report."""
