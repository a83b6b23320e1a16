"""turnwise.orchestrator."""
