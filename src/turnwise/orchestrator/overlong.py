"""The overlong penalty of DAPO (arXiv 2503.14476, section 3.4): a reply that nears the token limit costs more with each token."""

from dataclasses import dataclass

from turnwise.config import OrchestratorConfig

COMPONENT = "overlong"  # name of the penalty among the reward components of a rollout


@dataclass(frozen=True)
class OverlongPenalty:
    """min(0, -(tokens - (limit - buffer)) / buffer * factor).

    Each reply of a rollout is measured by itself, since the limit is one of replies, and pays at its own turn: with one reply
    a rollout that is the paper's formula, and with credit by turns the blame falls on the reply that was too long.
    """

    limit: int  # tokens; L_max of the paper
    buffer: int  # tokens; L_cache of the paper
    factor: float  # reward

    @classmethod
    def of(cls, settings: OrchestratorConfig) -> "OverlongPenalty | None":
        """The configured one; None where it is off."""
        overlong = settings.overlong
        return overlong and cls(settings.overlong_limit, overlong.buffer, overlong.factor)

    def of_reply(self, tokens: int) -> float:
        """What a reply of so many sampled tokens, its stop token among them, pays: 0 or less."""
        return min(0.0, -(tokens - (self.limit - self.buffer)) / self.buffer * self.factor)
