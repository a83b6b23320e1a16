"""What a generation request returns."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Completion:
    """One reply: sampled ids with the stop token, their logprobs in nats, and which version sampled which part."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    spans: tuple[tuple[int, int], ...]  # (policy version, tokens), in order

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs) or len(self.token_ids) != sum(n for _, n in self.spans):
            raise ValueError(
                f"{len(self.token_ids)} token ids, {len(self.logprobs)} logprobs, spans {self.spans}: lengths differ"
            )


def extend_spans(spans: list[tuple[int, int]], version: int, count: int) -> None:
    """Add `count` tokens of a version, to the last span where it is that version's."""
    if spans and spans[-1][0] == version:
        spans[-1] = (version, spans[-1][1] + count)
    else:
        spans.append((version, count))
