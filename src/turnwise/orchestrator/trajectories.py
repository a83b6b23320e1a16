"""trajectories/step_N.jsonl: every rollout that a batch accounts for, the dropped and the errored among them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from turnwise.orchestrator.batches import BatchBuilder
from turnwise.orchestrator.filters import JudgedGroup
from turnwise.orchestrator.samples import to_samples
from turnwise.orchestrator.types import Rollout
from turnwise.transport import write_atomic


def write_trajectories(folder: Path, builder: BatchBuilder) -> Path:
    """Write one line a rollout and return the file. Raises OSError when the file system refuses."""
    path = folder / f"step_{builder.step}.jsonl"
    encoder = msgspec.json.Encoder()
    taken = {judged.group.id for judged in builder.taken}
    records = (record for judged in builder.in_order() for record in _records(judged, builder.step, judged.group.id in taken))
    write_atomic(path, b"".join(encoder.encode(record) + b"\n" for record in records))
    return path


def _records(judged: JudgedGroup, step: int, taken: bool) -> Iterator[dict[str, Any]]:
    for rollout, advantages in zip(judged.group.rollouts, judged.advantages, strict=True):
        yield _record(rollout, [float(value) for value in advantages], judged, step, taken)
    for rollout in judged.group.failed_attempts:
        yield _record(rollout, [0.0] * len(rollout.turns), judged, step, False)


def _record(rollout: Rollout, advantages: list[float], judged: JudgedGroup, step: int, taken: bool) -> dict[str, Any]:
    samples = to_samples(rollout, advantages)
    turns = [
        {
            "prompt_tokens": len(turn.prompt_ids),
            "sampled_tokens": len(turn.sampled_ids),
            "spans": turn.spans,
            "finish_reason": turn.finish_reason,
            "components": turn.components,
            "reward": turn.reward,
            "advantage": advantage,
        }
        for turn, advantage in zip(rollout.turns, advantages, strict=True)
    ]
    return {
        **rollout.summary(),
        "step": step,
        "group_id": rollout.group_id,
        "attempt": rollout.attempt,
        "fate": str(judged.fate),
        "in_batch": taken and rollout.ok,
        "reward_dense": rollout.reward_dense,
        "reward_sparse": rollout.reward_sparse,
        "timing": rollout.timing,
        "turns": turns,
        "samples": [
            {
                "token_ids": sample.token_ids,
                "loss_mask": sample.loss_mask,
                "logprobs": sample.logprobs,
                "advantages": sample.advantages,
                "policy_versions": sample.policy_versions,
            }
            for sample in samples
        ],
    }
