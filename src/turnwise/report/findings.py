"""What looks wrong with a run, each with its evidence and what to do about it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from turnwise.monitor import State
from turnwise.monitor.symptoms import ENTROPY_FLOOR, EQUAL_SHARE, MORE_SIGNAL
from turnwise.report.balance import Balance
from turnwise.report.run import Run, Variety, replies

NOT_LEARNING = {
    State.FLAT: "The reward did not rise",
    State.COLLAPSING: "The run collapsed",
    State.NO_SIGNAL: "There was nothing to learn from",
}
LENGTH_FACTOR = 2.0
CUT_SHARE = 0.1  # of rollouts or replies that end because they are too long
ENTROPY_SHARE = 0.1  # of the entropy at the start
DISTINCT_SHARE = 0.1
COMMON_SHARE = 0.5
LEAST_REPLIES = 16  # fewer say nothing about variety
LOGPROB_GAP = 0.1  # nats a token; two bfloat16 implementations of a 135M model differ by 0.03 to 0.06, larger models by less
KL_GAP = 0.01  # nats a token
ERROR_SHARE = 0.01
RECENT = 50  # steps whose rollouts are searched for what errors say
LEAST_STEPS = 10  # fewer say nothing about a trend


@dataclass(frozen=True)
class Finding:
    """A warning of the report."""

    title: str
    evidence: str
    remedy: str


def findings(run: Run) -> list[Finding]:
    """All that is found, gravest kinds first; an empty run has none."""
    checks: list[Callable[[Run], Finding | None]] = [not_learning, errored, nonfinite, no_gradient, equal_groups]
    checks += [constant_replies, entropy_collapse, length_explosion, mismatch, dropped, waiting]
    return [finding for check in checks if (finding := check(run)) is not None]


def errored(run: Run) -> Finding | None:
    count = sum(run.series("rollouts/errored/count")[1])
    total = len(run.train_steps) * int(run.config.get("orchestrator", {}).get("batch_size", 0))
    if not count or (total and count / total < ERROR_SHARE):
        return None
    recent = (rollout for step in run.trajectory_steps()[-RECENT:] for rollout in run.rollouts(step))
    errors = Counter(str(rollout["error"]).strip().splitlines()[-1][:160] for rollout in recent if rollout.get("error"))
    common = "".join(f'; {number} × "{text}"' for text, number in errors.most_common(3))
    return Finding(
        "Rollouts ended with errors",
        f"{count:.0f} errored rollouts over {len(run.train_steps)} steps{common}",
        "read `error` in trajectories/*.jsonl and logs/orchestrator.stdout; raise the environment's `timeout_s` if they time out",
    )


def nonfinite(run: Run) -> Finding | None:
    steps, counts = run.series("monitor/nonfinite/count")
    if not steps:
        return None
    return Finding(
        "Metrics were NaN or infinite",
        f"{sum(counts):.0f} values, first at step {steps[0]}",
        "go back to a checkpoint before it; lower trainer.optim.lr or trainer.optim.max_grad_norm",
    )


def no_gradient(run: Run) -> Finding | None:
    steps, norms = run.series("actor/grad_norm")
    zero = [step for step, norm in zip(steps, norms, strict=True) if norm == 0]
    if not zero or len(zero) < len(steps) / 4:
        return None
    return Finding(
        "Steps without a gradient",
        f"the gradient norm was 0 in {len(zero)} of {len(steps)} steps, last at step {zero[-1]}",
        "rewards inside each group are equal: the gradient is the sum of advantages, and those are 0",
    )


def not_learning(run: Run) -> Finding | None:
    """The verdict, where it is a bad one."""
    title = NOT_LEARNING.get(run.learning.state)
    return None if title is None else Finding(title, run.learning.reason, run.learning.remedy)


def equal_groups(run: Run) -> Finding | None:
    _, shares = run.series("groups/equal_reward/share")
    if not shares or fmean(last := _ends(shares)[1]) < EQUAL_SHARE:
        return None
    return Finding(
        "Most groups carry no signal",
        f"{fmean(last):.0%} of the groups of the last {len(last)} steps had equal rewards ({fmean(shares):.0%} over the run)",
        MORE_SIGNAL,
    )


def length_explosion(run: Run) -> Finding | None:
    _, lengths = run.series("response_length/mean")
    evidence: list[str] = []
    first, last = (fmean(part) for part in _ends(lengths)) if len(lengths) >= LEAST_STEPS else (0.0, 0.0)
    if last > LENGTH_FACTOR * first:
        evidence.append(f"replies grew from {first:.0f} to {last:.0f} tokens (first and last third of the steps)")
    full = sum(run.series("stop_reason/context_full/count")[1])
    every = sum(sum(run.series(name)[1]) for name in run.names("stop_reason/", "/count"))
    if every and full / every > CUT_SHARE:
        evidence.append(f"{full / every:.0%} of the rollouts ended because the context was full")
    cut = run.series("response_length/cut/share")[1]
    if cut and fmean(_ends(cut)[1]) > CUT_SHARE:
        evidence.append(f"{fmean(_ends(cut)[1]):.0%} of the replies of the last third of the steps were cut by the token limit")
    if not evidence:
        return None
    return Finding(
        "Length explosion" if last > LENGTH_FACTOR * first else "Too long for the limits",
        "; ".join(evidence),
        'use loss.kind = "dr_grpo" or "dapo", which do not favour long wrong replies; punish length in the reward; '
        "lower sampling.max_tokens, or raise seq_len if the task needs the room",
    )


def entropy_collapse(run: Run) -> Finding | None:
    _, entropy = run.series("actor/entropy")
    if len(entropy) < LEAST_STEPS:
        return None
    first, last = (fmean(part) for part in _ends(entropy))
    if last > ENTROPY_FLOOR and last > ENTROPY_SHARE * first:
        return None
    return Finding(
        "Entropy collapse",
        f"{first:.3g} nats a token over the first third of the steps, {last:.3g} over the last",
        "stop earlier (best step), lower trainer.optim.lr, or set loss.entropy_coef, loss.kl_beta or loss.clip_high = 0.28",
    )


def constant_replies(run: Run) -> Finding | None:
    steps = run.trajectory_steps()
    variety = Variety.of([reply for step in steps[-3:] for reply in replies(run.rollouts(step))])
    if variety is None or variety.replies < LEAST_REPLIES:
        return None
    if variety.distinct / variety.replies > DISTINCT_SHARE and variety.most_common_share < COMMON_SHARE:
        return None
    shown = " ".join(variety.most_common.split())[:80]
    return Finding(
        "Replies collapsed to a constant",
        f"{variety.distinct} distinct replies among {variety.replies} of the last steps; "
        f"{variety.most_common_share:.0%} are `{shown}`",
        "go back to the best step; pay more for what depends on the situation than for the form (weights of the env's reward "
        "table), lower trainer.optim.lr, set loss.kl_beta or loss.entropy_coef",
    )


def mismatch(run: Run) -> Finding | None:
    """Judged on batches of the current policy alone: on older ones the policy's own progress is part of the difference."""
    fresh = [values for values in run.metrics.values() if not values.get("staleness/max")]
    worst_gap = max((values.get("mismatch/logprob_abs/mean", 0.0) for values in fresh), default=0.0)
    worst_kl = max((values.get("mismatch/kl/mean", 0.0) for values in fresh), default=0.0)
    if worst_gap < LOGPROB_GAP and worst_kl < KL_GAP:
        return None
    return Finding(
        "Engine and trainer disagree",
        f"logprobs of sampled tokens differ by up to {worst_gap:.3g} nats on average in a step, KL up to {worst_kl:.3g}",
        "use the same model.dtype on both sides, look whether canary/adapter_shown/mean is near 1 (the engine computes with what "
        "was published), "
        'or set loss.importance_sampling = "truncate"',
    )


def dropped(run: Run) -> Finding | None:
    steps, counts = run.series("groups/stale/count")
    if not sum(counts):
        return None
    return Finding(
        "Groups were too old to train on",
        f"{sum(counts):.0f} dropped for staleness over {len(steps)} steps",
        "raise orchestrator.max_staleness, lower max_inflight, or speed up the slow side (timing in the report)",
    )


def waiting(run: Run) -> Finding | None:
    """Without staleness the two sides take turns by design."""
    balance = Balance.of(run)
    if balance is None or balance.even or balance.max_staleness == 0:
        return None
    return Finding("One side waits for the other", balance.verdict, balance.remedy)


def _ends(values: list[float]) -> tuple[list[float], list[float]]:
    """First and last third."""
    third = max(1, len(values) // 3)
    return values[:third], values[-third:]
