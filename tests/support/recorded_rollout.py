"""A rollout as trajectories/step_N.jsonl records it."""

from typing import Any


def rollout(reward: float = 0.5, **changes: Any) -> dict[str, Any]:
    turn = {"reward": 0.25, "components": {"green": 0.25, "format": 0.0}, "sampled_tokens": 7}
    record = {
        "rollout_id": "g1-0",
        "env": "wordle",
        "task_id": "crane",
        "reward": reward,
        "components": {"green": 0.5, "format": 0.0},
        "tokens": 14,
        "turns": [turn, {**turn, "reward": 0.0, "components": {}}],
        "stop_reason": "terminated",
        "error": None,
        "messages": [
            {"role": "system", "content": "Play."},
            {"role": "assistant", "content": "worked example"},
            {"role": "user", "content": "guess"},
            {"role": "assistant", "content": "crane", "raw": "<guess>crane"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "slate"},
        ],
        "samples": [{"token_ids": [1, 2]}],
    }
    return record | changes
