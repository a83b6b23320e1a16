"""Rollout -> training samples. One sample as long as the tokens only grow at the end; a rewritten history starts another."""

from collections.abc import Sequence

from turnwise.orchestrator.types import Rollout, Turn
from turnwise.transport import NOT_SAMPLED, Sample


class _Draft:
    """The per-token lists of one sample while turns are added."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.loss_mask: list[bool] = []
        self.logprobs: list[float] = []
        self.advantages: list[float] = []
        self.versions: list[int] = []

    def continues(self, turn: Turn) -> bool:
        """Whether the turn's prompt begins with exactly the tokens gathered so far."""
        return list(turn.prompt_ids[: len(self.token_ids)]) == self.token_ids

    def add(self, turn: Turn, advantage: float) -> None:
        given = turn.prompt_ids[len(self.token_ids) :]
        self.token_ids += [*given, *turn.sampled_ids]
        self.loss_mask += [False] * len(given) + [True] * len(turn.sampled_ids)
        self.logprobs += [0.0] * len(given) + list(turn.logprobs)
        self.advantages += [0.0] * len(given) + [advantage] * len(turn.sampled_ids)
        self.versions += [NOT_SAMPLED] * len(given)
        for version, tokens in turn.spans:
            self.versions += [version] * tokens


def to_samples(rollout: Rollout, advantages: Sequence[float]) -> list[Sample]:
    """Training samples of a rollout; `advantages` holds one value a turn, in turn order."""
    drafts: list[_Draft] = []
    for turn, advantage in zip(rollout.turns, advantages, strict=True):
        if not turn.sampled_ids:
            continue
        if not drafts or not drafts[-1].continues(turn):
            drafts.append(_Draft())
        drafts[-1].add(turn, advantage)
    return [
        Sample(
            token_ids=draft.token_ids,
            loss_mask=draft.loss_mask,
            logprobs=draft.logprobs,
            advantages=draft.advantages,
            policy_versions=draft.versions,
            rollout_tokens=rollout.sampled_tokens,
            rollout_id=rollout.rollout_id,
            group_id=rollout.group_id,
            task_id=rollout.task_id,
        )
        for draft in drafts
    ]
