"""Samples that no rollout made: sequences to be measured, or of a length to be tried."""

from collections.abc import Sequence

from turnwise.transport import NOT_SAMPLED, Sample


def stand_in(
    ids: Sequence[int], name: str, *, prompt: int = 1, logprob: float = 0.0, advantage: float = 0.0, group: int = 0
) -> Sample:
    """A sample in which every token behind the first `prompt` ones counts as sampled, with these values each."""
    sampled = len(ids) - prompt
    return Sample(
        token_ids=list(ids),
        loss_mask=[False] * prompt + [True] * sampled,
        logprobs=[0.0] * prompt + [logprob] * sampled,
        advantages=[0.0] * prompt + [advantage] * sampled,
        policy_versions=[NOT_SAMPLED] * prompt + [0] * sampled,
        rollout_tokens=sampled,
        rollout_id=name,
        group_id=group,
        task_id=name,
    )
