"""The orchestrator: plays rollouts, scores them against their group, and hands batches to the trainer."""
