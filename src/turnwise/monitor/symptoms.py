"""What can be wrong with a run that does not learn, each with its evidence in numbers and what to do about it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median, stdev

from turnwise.monitor import facts as f
from turnwise.monitor.facts import Facts

EQUAL_SHARE = 0.5  # of groups without signal: half of the sampling is wasted
NO_SIGNAL_SHARE = 0.95  # of groups without signal: what is left is no batch
MOST = 0.9  # of the steps of the present: all but a few
CONSTANT_SHARE = 0.8  # of the replies that are the same one
CONSTANT_GROWTH = 2.0  # against the start of the run: a model that begins with one reply has not collapsed to it
ENTROPY_FLOOR = 0.02  # nats a token: one choice in fifty tokens that is not certain
ENTROPY_LOSS = 0.2  # of the entropy at the start; a policy that began near the floor has not collapsed to it
NOISE_KL = 0.1  # nats a token from which replies come from a policy too far off to learn from
KL_LIMIT = 0.5  # nats a token between two policies that should be one or two steps apart
BLOW_UP = 100.0  # gradient norms against their median before
CEILING = 0.95  # of the way from the worst to the best reward of any rollout
PUBLISHED_SHARE = 0.001  # of the published weights; a bfloat16 model at a learning rate of 1e-6 is at 0.004
SMALL_RATIO = 1e-6  # of the weights' norm, in a step; full fine-tuning at a learning rate of 1e-6 is at 2e-6 to 5e-6
LARGE_RATIO = 0.03  # likewise; the quickstart, at a high learning rate, begins with 1e-3
WRONG_WAY = 4.0  # standard errors by which updates lower the probability of what was rewarded
CLIPPED_SHARE = 0.9  # of the gradient's norm that clipping takes away

MORE_SIGNAL = (
    'use tasks that are neither always nor never solved (buffer.kind = "difficulty"), filters.dynamic_sampling = true, '
    "more rollouts_per_example, or a reward with more levels"
)
GO_BACK = "go back to the best checkpoint with a lower trainer.optim.lr or with trainer.loss.kl_beta"


@dataclass(frozen=True)
class Symptom:
    """Something that was found: a clause that can follow a colon, and what would help."""

    evidence: str
    remedy: str


Rule = Callable[[Facts], Symptom | None]


def first_of(rules: Iterable[Rule], facts: Facts) -> Symptom | None:
    """What the first rule that applies says."""
    return next((symptom for rule in rules if (symptom := rule(facts)) is not None), None)


# --- collapse ---------------------------------------------------------------------------------------------------------


def not_finite(facts: Facts) -> Symptom | None:
    broken, window = facts.broken_recently(), len(facts.recent_steps())
    if broken < max(3, window / 2):
        return None
    return Symptom(
        f"loss or gradient was NaN or infinite in {broken} of the last {window} steps",
        "go back to a checkpoint before it; lower trainer.optim.lr or trainer.optim.max_grad_norm",
    )


def constant_replies(facts: Facts) -> Symptom | None:
    """Replies became one. Where every rollout earns the best reward there is, one reply is what the task asks for."""
    now, early = f.mean(facts.recent(f.COMMON_REPLY)), f.mean(facts.early(f.COMMON_REPLY))
    if now is None or early is None or now < max(CONSTANT_SHARE, CONSTANT_GROWTH * early) or at_ceiling(facts):
        return None
    return Symptom(
        f"{now:.0%} of the replies of the last {facts.window} steps are the same one, against {early:.0%} at the start",
        "go back to the best checkpoint; pay more for what depends on the situation than for the form (weights of the env's "
        "reward table), lower trainer.optim.lr, set loss.kl_beta or loss.entropy_coef",
    )


def noise_too_large(facts: Facts) -> Symptom | None:
    """Noise in the norms of the policy that samples took it so far off that its replies say nothing about the clean one."""
    sigma, now = f.middle(facts.recent(f.SIGMA)), f.middle(facts.recent(f.MISMATCH))
    if not sigma or now is None or now <= KL_LIMIT:
        return None
    return Symptom(
        f"noise of sigma {sigma:.2g} in the norms took the sampling policy {now:.2g} nats a token away from the one that trains",
        f"lower inference.noise.sigma_start until mismatch/kl/mean stays below {NOISE_KL}: small norm weights bear little noise",
    )


def policies_apart(facts: Facts) -> Symptom | None:
    for name, text in (
        (f.MISMATCH, "engine and trainer disagree about the sampled tokens"),
        (f.KL, "the policy has moved away from the one that sampled"),
    ):
        now = f.middle(facts.recent(name))
        if now is not None and now > KL_LIMIT:
            return Symptom(f"{text}: KL {now:.2g} nats a token in the last {facts.window} steps", GO_BACK)
    return None


def gradient_blow_up(facts: Facts) -> Symptom | None:
    recent = facts.recent(f.GRADIENT)
    before = [norm for norm in facts.series(f.GRADIENT)[1][: -len(recent)] if norm > 0] if recent else []
    if len(before) < facts.window or median(recent) <= BLOW_UP * median(before):
        return None
    return Symptom(
        f"the gradient grew {median(recent) / median(before):.0f}-fold, to a norm of {median(recent):.3g}",
        f"{GO_BACK}; lower trainer.optim.max_grad_norm",
    )


def no_entropy(facts: Facts) -> Symptom | None:
    """The policy became certain of every token."""
    now, early = f.mean(facts.recent(f.ENTROPY)), f.mean(facts.early(f.ENTROPY))
    if now is None or early is None or now > min(ENTROPY_FLOOR, ENTROPY_LOSS * early):
        return None
    return Symptom(
        f"entropy fell from {early:.2g} to {now:.2g} nats a token, so that nothing new is tried any more",
        "go back to the best checkpoint; lower trainer.optim.lr, or set loss.entropy_coef, loss.kl_beta or loss.clip_high = 0.28",
    )


COLLAPSES: tuple[Rule, ...] = (not_finite, constant_replies, noise_too_large, policies_apart, gradient_blow_up)


# --- no signal --------------------------------------------------------------------------------------------------------


def no_gradient(facts: Facts) -> Symptom | None:
    norms = facts.recent(f.GRADIENT)
    if f.share(norms, 0.0) < MOST:
        return None
    cause = no_variance(facts)
    told = cause.evidence if cause else "the trainer got no advantages, or nothing that they act on trains"
    return Symptom(
        f"the gradient was 0 in {norms.count(0.0)} of the last {len(norms)} steps: {told}",
        cause.remedy if cause else "look at critic/advantages_abs/mean, and at `turnwise check`",
    )


def no_variance(facts: Facts) -> Symptom | None:
    """Rewards inside groups are equal, so that advantages are 0.

    Equal sums over turns alone are no proof: with `advantage.per_turn` their turns may differ.
    """
    equal, spreads, window = f.mean(facts.recent(f.EQUAL)), facts.recent(f.SPREAD), facts.window
    if (equal is None and not spreads) or (equal is not None and equal < NO_SIGNAL_SHARE):
        return None
    if f.share(spreads, 0.0) >= MOST:
        reward = f"{facts.recent(f.REWARD)[-1]:.3g}{_ceiling(facts)}"
        return Symptom(f"every rollout of the last {window} steps got the same reward, {reward}", MORE_SIGNAL)
    if equal is None:
        return None
    return Symptom(f"{equal:.0%} of the groups of the last {window} steps had equal rewards{_ceiling(facts)}", MORE_SIGNAL)


def no_update(facts: Facts) -> Symptom | None:
    updates = facts.recent(f.UPDATE)
    if f.share(updates, 0.0) < MOST:
        return None
    rate, norm = f.mean(facts.recent(f.LEARNING_RATE)), f.middle(facts.recent(f.GRADIENT))
    told = [f"a learning rate of {rate:.2g}"] if rate is not None else []
    told += [f"gradients of norm {norm:.2g}"] if norm is not None else []
    at = f", at {' and '.join(told)}" if told else ""
    return Symptom(
        f"the weights did not move in {updates.count(0.0)} of the last {len(updates)} steps{at}",
        "raise trainer.optim.lr; look at what trains (`turnwise check`)",
    )


def nothing_published(facts: Facts) -> Symptom | None:
    changed = facts.recent(f.PUBLISHED_CHANGE)
    if f.share(changed, 0.0) < MOST:
        return None
    return Symptom(
        f"none of the weights that engines read changed in {changed.count(0.0)} of the last {len(changed)} steps"
        f"{_update_size(facts)}",
        "raise trainer.optim.lr: the updates are lost where weights are rounded to the type in which they are published",
    )


NO_SIGNAL: tuple[Rule, ...] = (no_gradient, no_update, nothing_published, no_variance)


# --- why a reward is flat ---------------------------------------------------------------------------------------------


def ceiling_reached(facts: Facts) -> Symptom | None:
    if not at_ceiling(facts):
        return None
    best = max(facts.series(f.BEST)[1])
    return Symptom(f"it is at its ceiling, no rollout got more than {best:.3g}", "use harder tasks, or a reward with more levels")


def wrong_direction(facts: Facts) -> Symptom | None:
    """What was rewarded becomes less likely. Steps are taken as independent: each is measured on sequences of its own."""
    changes = facts.series(f.REWARDED)[1]
    if len(changes) < f.FEWEST_RECENT or fmean(changes) >= 0:
        return None
    error = stdev(changes) / math.sqrt(len(changes))
    if -fmean(changes) < WRONG_WAY * error:
        return None
    return Symptom(
        f"updates make what was rewarded less likely, by {-fmean(changes):.2g} nats a token and step",
        "run `turnwise check`: advantages, mask or logprobs are wrong, or the learning rate is far too high",
    )


def little_published(facts: Facts) -> Symptom | None:
    changed = f.mean(facts.recent(f.PUBLISHED_CHANGE))
    if changed is None or changed >= PUBLISHED_SHARE:
        return None
    return Symptom(
        f"a step changes {changed:.2%} of the weights that engines read{_update_size(facts)}",
        "raise trainer.optim.lr, or train in a finer type: most of each update is lost in rounding",
    )


def few_groups(facts: Facts) -> Symptom | None:
    equal = f.mean(facts.recent(f.EQUAL))
    if equal is None or equal < EQUAL_SHARE:
        return None
    return Symptom(f"{equal:.0%} of the groups have equal rewards and carry no signal", MORE_SIGNAL)


def small_updates(facts: Facts) -> Symptom | None:
    ratio = f.mean(facts.recent(f.UPDATE_RATIO))
    if ratio is None or ratio >= SMALL_RATIO:
        return None
    return Symptom(f"a step moves the weights by {ratio:.2g} of their norm", "raise trainer.optim.lr, tenfold at first")


def large_updates(facts: Facts) -> Symptom | None:
    ratio = f.mean(facts.recent(f.UPDATE_RATIO))
    if ratio is None or ratio < LARGE_RATIO:
        return None
    evidence = f"a step moves the weights by {ratio:.0%} of their norm, far beyond where its gradient holds"
    return Symptom(evidence, "lower trainer.optim.lr, tenfold at first")


def clipped(facts: Facts) -> Symptom | None:
    cut = f.mean(facts.recent(f.CLIPPED))
    if cut is None or cut < CLIPPED_SHARE:
        return None
    return Symptom(
        f"clipping leaves {1 - cut:.1%} of the gradient's norm",
        "raise trainer.optim.max_grad_norm: AdamW undoes a constant factor, but every batch counts alike then, whatever it holds",
    )


REASONS_FOR_FLAT: tuple[Rule, ...] = (
    ceiling_reached,
    large_updates,
    wrong_direction,
    little_published,
    few_groups,
    small_updates,
    clipped,
)


def at_ceiling(facts: Facts) -> bool:
    """Whether nearly all rollouts get the best reward that any got. Not where all rewards were always the same."""
    best, worst = facts.series(f.BEST)[1], facts.series(f.WORST)[1]
    now = f.mean(facts.recent(f.REWARD))
    if not best or not worst or now is None or max(best) <= min(worst):
        return False
    return now >= min(worst) + CEILING * (max(best) - min(worst))


def _ceiling(facts: Facts) -> str:
    return f", the best that any rollout got ({max(facts.series(f.BEST)[1]):.3g})" if at_ceiling(facts) else ""


def _update_size(facts: Facts) -> str:
    ratio = f.mean(facts.recent(f.UPDATE_RATIO))
    return "" if ratio is None else f"; a step moves the weights by {ratio:.2g} of their norm"
