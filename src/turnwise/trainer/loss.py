"""Policy-gradient losses as one pure function; the formulas, with their sources, are in docs/loss.md."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from turnwise.config import LossConfig

MAX_LOG_RATIO = 20.0  # exp(20) ~ 5e8: one mismatched token cannot overflow a sum


@dataclass(frozen=True)
class StepTotals:
    """Denominators of an optimiser step, over all ranks and micro-batches."""

    tokens: int  # sampled tokens
    sequences: int  # rollouts with a sampled token

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.sequences < 1:
            raise ValueError(f"a step of {self.tokens} tokens in {self.sequences} sequences has no loss; both must be positive")


@dataclass(frozen=True)
class LossOutput:
    """`loss` is this input's share of the step's loss; shares, and each of `metrics`, add up over micro-batches and ranks."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]  # detached scalars


@dataclass(frozen=True)
class _Tokens:
    """The input with one dimension, and zeros where the mask is False, so that padding may hold anything, NaN too."""

    logprobs: Float[Tensor, " tokens"]
    behaviour: Float[Tensor, " tokens"]
    advantages: Float[Tensor, " tokens"]
    reference: Float[Tensor, " tokens"] | None
    proximal: Float[Tensor, " tokens"] | None
    mask: Bool[Tensor, " tokens"]
    segments: Int[Tensor, " tokens"]  # 0 ... num_segments - 1
    num_segments: int


def policy_loss(
    logprobs: Float[Tensor, "*shape"],
    behaviour_logprobs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"],
    *,
    config: LossConfig,
    ref_logprobs: Float[Tensor, "*shape"] | None = None,
    proximal_logprobs: Float[Tensor, "*shape"] | None = None,
    segment_ids: Int[Tensor, " tokens"] | None = None,
    totals: StepTotals | None = None,
    rollout_tokens: Int[Tensor, " segments"] | None = None,
) -> LossOutput:
    """The loss of `config.kind` over the tokens in `mask`; its gradient flows into `logprobs` only.

    Args:
        logprobs: current policy, nats; `[batch, tokens]` (a row is a sample) or packed `[tokens]` (then with `segment_ids`).
        behaviour_logprobs: of the policy that sampled, as the engine returned them.
        advantages: one a token.
        mask: True where the policy sampled the token.
        config: kind and options.
        ref_logprobs: of the reference policy; needed when `kl_beta > 0`.
        proximal_logprobs: the trainer's own before the first update of the step. When given, ratios are taken against them;
            importance sampling needs them.
        segment_ids: sample of each packed token, counted from 0.
        totals: of the whole optimiser step; None when this input is the step.
        rollout_tokens: sampled tokens of the rollout that each sample belongs to; None when each sample is a whole rollout.

    Raises:
        ValueError: something that the options need was not given.
    """
    _check(config, mask, segment_ids, ref_logprobs, proximal_logprobs)
    segments = None if rollout_tokens is None else len(rollout_tokens)
    tokens = _flatten(logprobs, behaviour_logprobs, advantages, mask, ref_logprobs, proximal_logprobs, segment_ids, segments)
    counts = _segment_sum(tokens.mask.to(logprobs.dtype), tokens)
    lengths = counts if rollout_tokens is None else rollout_tokens.to(logprobs.dtype)
    totals = totals or _own_totals(counts, lengths)
    weights = _weights(tokens, lengths, totals, config)
    objective, clipped = _objective(tokens, counts, config)
    importance, cut = _importance(tokens, config)
    per_token = objective * importance
    kl_to_reference = None if tokens.reference is None else _kl(tokens.reference - tokens.logprobs, config.kl_kind)
    if kl_to_reference is not None:
        per_token = per_token + config.kl_beta * kl_to_reference
    share = tokens.mask.to(logprobs.dtype) / totals.tokens
    metrics = _metrics(tokens, share, clipped, importance, cut, kl_to_reference, config)
    return LossOutput((per_token * weights).sum(), metrics)


def _check(
    config: LossConfig, mask: Tensor, segment_ids: Tensor | None, ref_logprobs: Tensor | None, proximal_logprobs: Tensor | None
) -> None:
    if mask.ndim == 1 and segment_ids is None:
        raise ValueError("packed input [tokens] needs segment_ids: without them samples cannot be told apart")
    if mask.ndim == 2 and segment_ids is not None:
        raise ValueError("segment_ids are for packed input [tokens]; in [batch, tokens] a row is a sample")
    if config.importance_sampling != "none" and proximal_logprobs is None:
        raise ValueError(
            f"trainer.loss.importance_sampling = {config.importance_sampling!r} weights tokens by exp(proximal - behaviour): "
            "pass proximal_logprobs, the trainer's own before the first update, or set it to 'none'"
        )
    if config.kl_beta > 0 and ref_logprobs is None:
        raise ValueError(f"trainer.loss.kl_beta = {config.kl_beta} needs ref_logprobs; pass them or set it to 0")
    if config.kind == "dr_grpo" and config.max_completion_tokens is None:
        raise ValueError("trainer.loss.kind = 'dr_grpo' divides by max_completion_tokens, which is unset; set it")


def _flatten(
    logprobs: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    mask: Tensor,
    reference: Tensor | None,
    proximal: Tensor | None,
    segment_ids: Tensor | None,
    num_segments: int | None,  # when it is known, nobody has to wait for the device to say so
) -> _Tokens:
    if segment_ids is None:
        segments = torch.arange(mask.shape[0], device=mask.device)[:, None].expand(mask.shape)
        num_segments = mask.shape[0]
    else:
        segments = segment_ids.clamp_min(0)  # padding may be numbered -1
        if num_segments is None:
            num_segments = int(segment_ids.max()) + 1 if segment_ids.numel() else 0

    def masked(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0).flatten()

    return _Tokens(
        masked(logprobs),
        masked(behaviour),
        masked(advantages),
        None if reference is None else masked(reference),
        None if proximal is None else masked(proximal),
        mask.flatten(),
        segments.flatten(),
        num_segments,
    )


def _segment_sum(values: Float[Tensor, " tokens"], tokens: _Tokens) -> Float[Tensor, " segments"]:
    return values.new_zeros(tokens.num_segments).index_add(0, tokens.segments, values)


def _own_totals(counts: Tensor, lengths: Tensor) -> StepTotals:
    """Totals of an input that is the whole step: each sample is the share counts / lengths of its rollout."""
    sequences = (counts / lengths.clamp_min(1)).sum()
    return StepTotals(tokens=int(counts.sum()), sequences=round(float(sequences)))


def _weights(tokens: _Tokens, lengths: Tensor, totals: StepTotals, config: LossConfig) -> Float[Tensor, " tokens"]:
    """What each token counts in the loss: 0 outside the mask."""
    ones = tokens.mask.to(tokens.logprobs.dtype)
    if config.kind in ("dapo", "cispo"):
        return ones / totals.tokens
    if config.kind == "dr_grpo":
        assert config.max_completion_tokens is not None
        return ones / (totals.sequences * config.max_completion_tokens)
    return ones / (lengths.clamp_min(1)[tokens.segments] * totals.sequences)


def _objective(tokens: _Tokens, counts: Tensor, config: LossConfig) -> tuple[Tensor, Bool[Tensor, " tokens"]]:
    """Loss of each token before weighting, and where clipping took effect."""
    old = tokens.behaviour if tokens.proximal is None else tokens.proximal
    log_ratio = tokens.logprobs - old
    if config.kind == "gspo":
        log_ratio = (_segment_sum(log_ratio, tokens) / counts.clamp_min(1))[tokens.segments]
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if config.kind == "cispo":
        weight = ratio.detach().clamp_max(config.clip_high)
        return -weight * tokens.advantages * tokens.logprobs, ratio > config.clip_high
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    plain, bounded = -tokens.advantages * ratio, -tokens.advantages * clipped_ratio
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    if config.dual_clip is not None:
        ceiling = -tokens.advantages * config.dual_clip
        cut = (tokens.advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(cut, ceiling, loss), clipped | cut
    return loss, clipped


def _importance(tokens: _Tokens, config: LossConfig) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Detached weight of the engine's mismatch, and where it was cut or its token left out: 1 without importance sampling."""
    if config.importance_sampling == "none" or tokens.proximal is None:
        return torch.ones_like(tokens.logprobs), torch.zeros_like(tokens.mask)
    weight = (tokens.proximal - tokens.behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().detach()
    cut = ~(weight <= config.importance_cap)  # NaN too
    if config.importance_sampling == "truncate":
        return weight.clamp_max(config.importance_cap), cut
    return torch.where(cut, 0, weight), cut


def _kl(log_ratio: Tensor, kind: str) -> Tensor:
    """Estimate of KL(new || ref) from a token of `new`, with log_ratio = ref - new (Schulman's k1, k2, k3)."""
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    return log_ratio.exp() - log_ratio - 1


def _metrics(
    tokens: _Tokens,
    share: Tensor,
    clipped: Tensor,
    importance: Tensor,
    cut: Tensor,
    kl_to_reference: Tensor | None,
    config: LossConfig,
) -> dict[str, Tensor]:
    def mean(values: Tensor) -> Tensor:
        return (values.detach() * share).sum()

    metrics = {
        "actor/clip_fraction": mean(clipped.to(share.dtype)),
        "actor/kl": mean(_kl(tokens.logprobs - tokens.behaviour, "k3")),
    }
    if kl_to_reference is not None:
        metrics["actor/kl_loss"] = mean(kl_to_reference)
    if config.importance_sampling != "none":
        metrics["mismatch/importance_weight/mean"] = mean(importance)
        metrics["mismatch/importance_cut/share"] = mean(cut.to(share.dtype))
    return metrics
