"""Metrics of a batch, from the rollouts it accounts for. Names as in docs/metrics.md."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np

from turnwise.orchestrator.batches import BatchBuilder
from turnwise.orchestrator.filters import Fate, JudgedGroup
from turnwise.orchestrator.types import Rollout
from turnwise.transport import Sample

Metrics = dict[str, float]

USABLE = (Fate.SIGNAL, Fate.EQUAL)


def batch_metrics(builder: BatchBuilder, samples: Sequence[Sample], *, seconds: float, served: int) -> Metrics:
    """What the rollouts of a batch were like.

    Rewards, lengths and components are means over every judged rollout without error that was fresh enough, filtered groups
    among them: a filter that hides equal groups must not flatter the reward. Advantages are those of the samples.

    Args:
        seconds: since the batch before was complete.
        served: version that the engines serve now.
    """
    groups = builder.in_order()
    rollouts = [r for judged in groups if judged.fate in USABLE for r in judged.group.valid]
    every = [r for judged in groups for r in (*judged.group.rollouts, *judged.group.failed_attempts)]
    tokens = sum(rollout.sampled_tokens for rollout in every)
    # rollouts that ran beside an earlier batch are ready at once: what they took bounds the rate then
    producing = max([seconds, *(rollout.timing["total_s"] for rollout in every)])
    return {
        **_rewards(rollouts),
        **_advantages(samples),
        **_lengths(rollouts),
        **_tool_calls(groups),
        **mean_by_name("reward", (rollout.components for rollout in rollouts), missing=0.0),
        **mean_by_name("env", (rollout.metrics for rollout in rollouts)),
        **{f"stop_reason/{reason}/count": float(n) for reason, n in Counter(r.stop_reason for r in every).items()},
        **_staleness(samples, builder.step),
        "staleness/lag": float(builder.step - 1 - served),
        **_groups(builder),
        "rollouts/errored/count": float(sum(not rollout.ok for rollout in every)),
        **_common_reply(rollouts),
        "timing/rollout_s": fmean(r.timing["total_s"] for r in rollouts) if rollouts else 0.0,
        "timing/env_s": fmean(r.timing["env_s"] for r in rollouts) if rollouts else 0.0,
        "timing/batch_s": seconds,
        "throughput/tokens_per_s": tokens / producing if producing > 0 else 0.0,
    }


def mean_by_name(area: str, records: Iterable[Mapping[str, float]], *, missing: float | None = None) -> Metrics:
    """`area/<name>/mean` over records. A record without the name counts as `missing`, or not at all when that is None."""
    listed = list(records)
    names = sorted({name for record in listed for name in record})
    means: Metrics = {}
    for name in names:
        values = [record.get(name, missing) for record in listed]
        means[f"{area}/{name}/mean"] = fmean(value for value in values if value is not None)
    return means


def _groups(builder: BatchBuilder) -> Metrics:
    fates = Counter(judged.fate for judged in builder.judged)
    usable = fates[Fate.SIGNAL] + fates[Fate.EQUAL]
    return {
        "groups/equal_reward/share": fates[Fate.EQUAL] / usable if usable else 0.0,
        "groups/dropped/count": float(len(builder.judged) - fates[Fate.SIGNAL]),
        "groups/stale/count": float(fates[Fate.STALE]),
        "groups/errored/count": float(fates[Fate.ERRORED]),
        "groups/rounds/count": float(builder.rounds),
    }


def _rewards(rollouts: Sequence[Rollout]) -> Metrics:
    if not rollouts:
        return {}
    rewards = [rollout.reward for rollout in rollouts]
    return {
        "critic/reward/mean": fmean(rewards),
        "critic/reward/std": float(np.std(rewards)),
        "critic/reward/min": min(rewards),
        "critic/reward/max": max(rewards),
        "critic/reward_dense/mean": fmean(rollout.reward_dense for rollout in rollouts),
        "critic/reward_sparse/mean": fmean(rollout.reward_sparse for rollout in rollouts),
    }


def _advantages(samples: Sequence[Sample]) -> Metrics:
    if not samples:
        return {}
    values = np.concatenate([np.asarray(sample.advantages)[np.asarray(sample.loss_mask)] for sample in samples])
    size = np.abs(values)
    return {
        "critic/advantages/mean": float(values.mean()),
        "critic/advantages/std": float(values.std()),
        "critic/advantages_abs/mean": float(size.mean()),
        "critic/advantages_abs/max": float(size.max(initial=0.0)),
    }


def _common_reply(rollouts: Sequence[Rollout]) -> Metrics:
    """How common the commonest reply is. Tokens are compared: of a reply that calls tools, the text may be empty."""
    counts = Counter(tuple(turn.sampled_ids) for rollout in rollouts for turn in rollout.turns)
    return {"rollouts/common_reply/share": max(counts.values()) / counts.total()} if counts else {}


def _lengths(rollouts: Sequence[Rollout]) -> Metrics:
    if not rollouts:
        return {}
    lengths = [rollout.sampled_tokens for rollout in rollouts]
    prompts = [len(rollout.turns[0].prompt_ids) for rollout in rollouts if rollout.turns]
    cut = [turn.finish_reason == "length" for rollout in rollouts for turn in rollout.turns]
    return {
        "response_length/mean": fmean(lengths),
        "response_length/max": float(max(lengths)),
        "response_length/min": float(min(lengths)),
        "response_length/cut/share": fmean(cut) if cut else 0.0,
        "prompt_length/mean": fmean(prompts) if prompts else 0.0,
        "num_turns/mean": fmean(len(rollout.turns) for rollout in rollouts),
    }


def _tool_calls(groups: Sequence[JudgedGroup]) -> Metrics:
    """Of the rollouts that were offered tools."""
    rollouts = [r for judged in groups if judged.fate in USABLE and judged.group.task.env.tools for r in judged.group.valid]
    if not rollouts:
        return {}
    calls = [call for rollout in rollouts for call in rollout.tool_calls()]
    malformed = fmean("error" in call for call in calls) if calls else 0.0
    return {"tool_calls/count/mean": len(calls) / len(rollouts), "tool_calls/malformed/share": malformed}


def _staleness(samples: Sequence[Sample], step: int) -> Metrics:
    ages = [step - 1 - sample.oldest_version for sample in samples]
    return {"staleness/mean": fmean(ages), "staleness/max": float(max(ages))} if ages else {}
