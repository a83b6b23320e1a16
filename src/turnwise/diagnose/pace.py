"""How long a step and a run take, from what was measured on a few rollouts and one step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from turnwise.orchestrator.filters import JudgedGroup


@dataclass(frozen=True)
class Played:
    """Rollouts that were played side by side."""

    rollouts: int
    tokens: int  # sampled
    seconds: float  # from the first that began to the last that was done

    @classmethod
    def of(cls, groups: "Sequence[JudgedGroup]") -> Self:
        """Of all rollouts of some groups, with attempts that failed."""
        every = [r for judged in groups for r in (*judged.group.rollouts, *judged.group.failed_attempts)]
        begun = min(rollout.timing["started"] for rollout in every)
        done = max(rollout.timing["started"] + rollout.timing["total_s"] for rollout in every)
        return cls(len(every), sum(rollout.sampled_tokens for rollout in every), done - begun)

    def seconds_for(self, rollouts: float) -> float:
        """Of as many rollouts at this rate; where engines still have room, more of them side by side go faster."""
        return self.seconds * rollouts / self.rollouts
