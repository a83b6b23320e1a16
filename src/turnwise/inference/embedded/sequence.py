"""One generation request on its way through the engine."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(eq=False, slots=True)
class Sequence:
    """A prompt, how to continue it, and what has been sampled so far."""

    prompt: list[int]
    max_tokens: int
    temperature: float  # 0 is greedy
    seed: int
    stop_ids: frozenset[int]
    adapter: str | None  # None is the base model
    on_done: Callable[["Sequence"], None]  # called in the worker thread, once
    tokens: list[int] = field(default_factory=list)  # prompt and sampled ids
    logprobs: list[float] = field(default_factory=list)  # nats, one for each sampled id; NaN where its logits were not finite
    computed: int = 0  # leading tokens whose keys and values are in the cache
    finish_reason: FinishReason | None = None
    error: str = ""  # why the request failed; the others of finish reason "error" are answered, with what there is
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def sampled(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    def append(self, token: int, logprob: float) -> None:
        """Take a sampled token and decide whether it was the last one. None follows a token of no distribution."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if math.isnan(logprob):
            self.finish_reason = "error"
        elif token in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.logprobs) >= self.max_tokens:
            self.finish_reason = "length"
