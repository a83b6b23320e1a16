"""Rewards -> advantages, centred inside a group of rollouts of one task.

`grpo`: (R - mean) / (std + eps) with the unbiased std (arXiv 2402.03300). `grpo_nostd`: R - mean (Dr. GRPO, arXiv 2503.20783).
`rloo`: R - mean of the others (arXiv 2402.14740). Per turn: the return from that turn on, less the mean of the others' at it.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

AdvantageKind = Literal["grpo", "grpo_nostd", "rloo"]
FloatArray = npt.NDArray[np.float64]

EPS = 1e-6
EQUAL_STD = 1e-6  # a group whose std is below this counts as equal: dividing by such a std once blew advantages up 4000-fold


def group_advantages(rewards: npt.ArrayLike, *, kind: AdvantageKind, valid: npt.ArrayLike | None = None) -> FloatArray:
    """Advantages `[groups, group_size]` of rewards of that shape.

    Errored rollouts, `valid` False, enter no mean and get 0. A group of one valid rollout has mean 0 and std 1.

    Raises:
        ValueError: the rewards are not two-dimensional, `valid` has another shape, a valid reward is not finite, or the kind
            is unknown.
    """
    values = np.asarray(rewards, dtype=np.float64)
    mask = np.ones(values.shape, dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
    if values.ndim != 2 or mask.shape != values.shape:
        raise ValueError(f"rewards {values.shape} and valid {mask.shape} must both be [groups, group_size]")
    if not np.isfinite(values[mask]).all():
        raise ValueError("a reward of a valid rollout is not finite")
    values = np.where(mask, values, 0.0)
    count = mask.sum(axis=1, keepdims=True)
    alone = count <= 1
    mean = np.where(alone, 0.0, values.sum(axis=1, keepdims=True) / np.maximum(count, 1))
    centred = np.where(mask, values - mean, 0.0)
    std = np.sqrt((centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1))
    centred = np.where((std < EQUAL_STD) & ~alone, 0.0, centred)
    match kind:
        case "grpo":
            return centred / np.where(alone, 1.0, std + EPS)
        case "grpo_nostd":
            return centred
        case "rloo":  # R - (sum - R) / (n - 1) = n / (n - 1) * (R - mean)
            return centred * np.where(alone, 1.0, count / np.maximum(count - 1, 1))
        case _:  # pyright: ignore[reportUnnecessaryComparison]  # callers outside may pass any text
            raise ValueError(f"advantage kind {kind!r} is unknown; use grpo, grpo_nostd or rloo")


def turn_advantages(turn_rewards: Sequence[Sequence[float]], *, valid: Sequence[bool] | None = None) -> list[FloatArray]:
    """Per-turn advantages of one group, ragged as `turn_rewards[rollout][turn]`.

    With G[i, t] the return of rollout i from turn t on and T_j the last turn of rollout j:
    A[i, t] = G[i, t] - mean over j != i of G[j, min(t, T_j)]. The baseline at a turn depends on the other rollouts alone, so
    the gradient stays unbiased under varying turn counts; where only the last turn pays, it is `rloo`.
    """
    usable = [bool(rewards) and (valid is None or valid[i]) for i, rewards in enumerate(turn_rewards)]
    returns = [np.cumsum(np.asarray(rewards, dtype=np.float64)[::-1])[::-1] for rewards in turn_rewards]
    longest = max((len(values) for values in returns), default=0)
    # [rollouts, turns], each row held at its last turn; rows of unusable rollouts are 0 and enter no sum
    padded = np.zeros((len(returns), longest))
    for i, values in enumerate(returns):
        if usable[i]:
            padded[i] = values[np.minimum(np.arange(longest), len(values) - 1)]
    total, count = padded.sum(axis=0), sum(usable)
    advantages: list[FloatArray] = []
    for i, values in enumerate(returns):
        turns = len(values)
        baseline = (total - padded[i])[:turns] / (count - 1) if count > 1 else np.zeros(turns)
        advantages.append(values - baseline if usable[i] else np.zeros(turns))
    return advantages


def has_signal(advantages: Sequence[Any]) -> bool:
    """Whether any advantage of a group differs from zero by more than rounding."""
    return any(bool(np.any(np.abs(np.asarray(values)) > EPS)) for values in advantages)
