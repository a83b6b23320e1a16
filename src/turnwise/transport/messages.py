"""What crosses the boundary between orchestrator and trainer. Frozen, validated when made, never pickled."""

from typing import Any, Literal

import msgspec

NOT_SAMPLED = -1  # policy version of a token that no policy chose: prompt, observation, appended end token


class Sample(msgspec.Struct, frozen=True):
    """One training sequence: a rollout, or a part of one whose template rewrote its history.

    All per-token lists have the length of `token_ids`; where `loss_mask` is False they hold 0.0 and `NOT_SAMPLED`.
    """

    token_ids: list[int]
    loss_mask: list[bool]  # True where the policy sampled the token
    logprobs: list[float]  # nats, of the distribution that was sampled, as the engine returned them
    advantages: list[float]
    policy_versions: list[int]
    rollout_tokens: int  # sampled tokens of the whole rollout, over all its samples
    rollout_id: str
    group_id: int
    task_id: str

    def __post_init__(self) -> None:
        lengths = {len(self.loss_mask), len(self.logprobs), len(self.advantages), len(self.policy_versions)}
        if lengths != {len(self.token_ids)}:
            raise ValueError(f"rollout {self.rollout_id}: per-token lists of lengths {lengths} for {len(self.token_ids)} tokens")
        if any(masked != (version != NOT_SAMPLED) for masked, version in zip(self.loss_mask, self.policy_versions, strict=True)):
            raise ValueError(f"rollout {self.rollout_id}: a token is in the loss mask without a policy version, or the reverse")

    @property
    def oldest_version(self) -> int:
        """Oldest policy version among the sampled tokens; `NOT_SAMPLED` if there is none."""
        return min((v for v in self.policy_versions if v != NOT_SAMPLED), default=NOT_SAMPLED)


class Progress(msgspec.Struct, frozen=True):
    """Where the orchestrator stands after a batch: enough to go on without repeating or losing a group."""

    next_group: int = 0
    pending: list[int] = []  # groups issued, neither in a batch nor dropped: issued again at resume
    state: dict[str, Any] = {}  # buffer statistics and counters


class Batch(msgspec.Struct, frozen=True):
    """The input of one optimiser step."""

    step: int  # 1-based: batch k is consumed by step k, which turns policy version k - 1 into k
    samples: list[Sample]
    rollout_ids: list[str]  # every rollout that this batch accounts for, with those that carry no sample
    num_rollouts: int
    temperature: float  # of the training rollouts; the trainer divides its logits by it
    progress: Progress
    metrics: dict[str, float] = {}
    max_completion_tokens: int = 0  # most tokens that one rollout may sample, for dr_grpo


class Canary(msgspec.Struct, frozen=True):
    """A sequence with the trainer's own logprobs, by which an engine that serves another policy gives itself away."""

    token_ids: list[int]
    logprobs: list[float]  # of token_ids[1:] under the announced version, nats, temperature 1
    before: list[float]  # the same under the version before
    base: list[float] = []  # the same under the base model, where the policy is an adapter on it

    def __post_init__(self) -> None:
        lengths = {len(self.logprobs), len(self.before), len(self.base) or len(self.logprobs)}
        if lengths != {len(self.token_ids) - 1}:
            raise ValueError(f"a canary of {len(self.token_ids)} tokens has logprobs of lengths {lengths}; one less is right")


class WeightsReady(msgspec.Struct, frozen=True):
    """The trainer's announcement of a policy version."""

    version: int  # optimiser steps taken
    kind: Literal["lora", "full"]
    path: str  # folder: a PEFT adapter, a Hugging Face checkpoint, or the manifest of a broadcast
    digest: str  # `tensor_digest` of the tensors as engines hold them
    metrics: dict[str, float] = {}  # of the step that made it
    transfer: Literal["files", "broadcast"] = "files"
    rendezvous: str = ""  # host:port of the trainer's store, where a broadcast begins
    canaries: list[Canary] = []


class Served(msgspec.Struct, frozen=True):
    """The orchestrator's answer: engines serve this version, and that was proven."""

    version: int
