"""What a rollout leaves behind. Frozen, with lengths checked once, here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

Message = dict[str, Any]  # {"role", "content"}; assistant: `AssistantMessage.to_message`; tool: `tool_message`


class StopReason(StrEnum):
    """Why a rollout ended; each is a metric `stop_reason/<reason>/count`."""

    TERMINATED = "terminated"  # the environment says that the task is over
    TRUNCATED = "truncated"  # the environment's own limit
    MAX_TURNS = "max_turns"
    CONTEXT_FULL = "context_full"  # no room for another reply within `seq_len`
    ERROR = "error"
    STRAGGLER = "straggler"  # older than `orchestrator.straggler_timeout_s`
    OUTAGE = "outage"  # what the environment stands on is down: void, and played again

    @property
    def is_error(self) -> bool:
        return self in (StopReason.ERROR, StopReason.STRAGGLER, StopReason.OUTAGE)


@dataclass(frozen=True, slots=True)
class Turn:
    """One reply of the policy and what the environment paid for it."""

    prompt_ids: Sequence[int]  # as sent to the engine
    sampled_ids: Sequence[int]  # as returned, with the stop token where one was sampled
    logprobs: Sequence[float]  # nats, one a sampled token
    spans: Sequence[tuple[int, int]]  # ((version, tokens), ...) in order, over the sampled tokens
    finish_reason: str  # "stop" | "length"
    components: Mapping[str, float]
    reward: float  # the components under the config's reward mode

    def __post_init__(self) -> None:
        spanned = sum(tokens for _, tokens in self.spans)
        if not len(self.sampled_ids) == len(self.logprobs) == spanned:
            raise ValueError(
                f"a turn of {len(self.sampled_ids)} tokens came with {len(self.logprobs)} logprobs and spans over {spanned}"
            )


@dataclass(frozen=True)
class Rollout:
    """One episode, whole or broken off by an error."""

    rollout_id: str
    group_id: int
    env: str
    task_id: str
    turns: tuple[Turn, ...]
    messages: tuple[Message, ...]
    stop_reason: StopReason
    reward: float = 0.0  # what the advantage is made from: dense or sparse, as configured
    reward_dense: float = 0.0
    reward_sparse: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str | None = None
    timing: Mapping[str, float] = field(default_factory=dict)  # seconds: total, engine, env; unix time at the start
    attempt: int = 0

    @property
    def ok(self) -> bool:
        return self.error is None

    @cached_property
    def components(self) -> dict[str, float]:
        """Reward components, summed over the turns."""
        total: dict[str, float] = {}
        for turn in self.turns:
            for name, value in turn.components.items():
                total[name] = total.get(name, 0.0) + value
        return total

    @cached_property
    def sampled_tokens(self) -> int:
        return sum(len(turn.sampled_ids) for turn in self.turns)

    @cached_property
    def oldest_version(self) -> int | None:
        """Oldest policy version that chose a token; None when nothing was sampled."""
        return min((version for turn in self.turns for version, tokens in turn.spans if tokens), default=None)

    @property
    def said(self) -> list[Message]:
        """The policy's own messages, one a turn; those of the assistant before them are worked examples."""
        messages = [message for message in self.messages if message["role"] == "assistant"]
        return messages[max(0, len(messages) - len(self.turns)) :]

    def replies(self) -> list[str]:
        """What the policy said, calls and all."""
        return [message.get("raw") or message["content"] for message in self.said]

    def tool_calls(self) -> list[Mapping[str, Any]]:
        """The calls of all replies, as `ToolCall.spec` gives them; those that could not be run have an `error`."""
        return [call for message in self.said for call in message.get("tool_calls", ())]

    def summary(self) -> dict[str, Any]:
        """The rollout without its tokens, for evals/step_N.json."""
        return {
            "rollout_id": self.rollout_id,
            "env": self.env,
            "task_id": self.task_id,
            "reward": self.reward,
            "components": self.components,
            "metrics": dict(self.metrics),
            "turns": len(self.turns),
            "tokens": self.sampled_tokens,
            "stop_reason": str(self.stop_reason),
            "error": self.error,
            "messages": list(self.messages),
        }
