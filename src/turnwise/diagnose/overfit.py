"""Does it learn anything at all? One task, a few steps with a bold learning rate, through `rl` itself: the reward must rise.

Groups of rollouts are the unit of the statistics: those of a group share a seed of the environment, which may make it easier
than others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, sqrt
from statistics import fmean, pvariance, variance
from typing import TYPE_CHECKING, Any

from turnwise.config import RLConfig
from turnwise.diagnose.core import Check, CheckFailed, Finding, Verdict
from turnwise.diagnose.overfit_run import Rewards, ShortRun, play
from turnwise.diagnose.pace import Played
from turnwise.launch.live import duration, sparkline
from turnwise.launch.resolve import changed

if TYPE_CHECKING:
    from turnwise.diagnose.context import Context
    from turnwise.launch.shape import ModelShape
    from turnwise.orchestrator.filters import JudgedGroup

STEPS = 8
ROLLOUTS = {"CPU": 16, "GPU": 32}  # of a step, at most; on GPUs twice as many take hardly longer
FEWEST_STEPS = 4  # before it can be clear that the reward rises
FEWEST_GROUPS = 4  # of a step: some seeds of an environment are easier than others, and that is no rise
STRIDE = 2.0  # learning rate times the root of the number of trained parameters
UNKNOWN_SIZE = {"lora": 3e-4, "full": 2e-5}  # learning rates where that number is not known: those of a model of 7B
LIMIT_S = 900.0
RISEN, CLEAR = 2.0, 4.0  # standard errors of either difference: a rise, and one that needs no further step
FALLEN = 3.5  # standard errors between the thirds


@dataclass(frozen=True)
class Rise:
    """How the reward moved."""

    before: float  # mean over groups
    after: float
    error: float  # standard error of the difference
    steps: int  # that make up `before`

    @property
    def errors(self) -> float:
        """The difference in standard errors."""
        difference = self.after - self.before
        return difference / self.error if self.error > 0 else inf * difference if difference else 0.0


def movement(rewards: Rewards) -> list[Rise]:
    """Two differences, as far as there are enough groups to compare.

    Between the first and the last third of the steps, for what is learned step by step; and between the first step, which the
    untrained policy plays, and all others, for what is learned at once.
    """
    third = max(len(rewards) // 3, min(2, len(rewards) // 2))
    splits = [(rewards[:third], rewards[-third:], third), (rewards[:1], rewards[1:], 1)] if len(rewards) > 1 else []
    return [moved for before, after, steps in splits if (moved := _difference(before, after, steps)) is not None]


def _difference(before: Rewards, after: Rewards, steps: int) -> Rise | None:
    first, last = ([value for groups in part for value in groups] for part in (before, after))
    if min(len(first), len(last)) < 2:
        return None
    own = [variance(first), variance(last)]
    pooled = (own[0] * (len(first) - 1) + own[1] * (len(last) - 1)) / (len(first) + len(last) - 2)
    # a side of few groups borrows from the other, but a policy that has become certain must not vouch for one that was not
    squares = (max(mine, pooled) / count for mine, count in zip(own, (len(first), len(last)), strict=True))
    return Rise(fmean(first), fmean(last), sqrt(sum(squares)), steps)


def clearly_risen(rewards: Rewards) -> bool:
    """Whether no further step is needed."""
    return len(rewards) >= FEWEST_STEPS and any(moved.errors >= CLEAR for moved in movement(rewards))


def bold_learning_rate(own: float, trained: int | None, *, lora: bool) -> float:
    """A learning rate that shows within a few steps whether anything is learned; never below the configured one.

    AdamW's first steps move every parameter by the learning rate, so a step changes the loss by up to lr * |g|_1, which is near
    lr * sqrt(parameters) * |g|_2 for gradients without a few large entries. With a product of 2 that is the same bold step for an
    adapter of 5 million parameters (9e-4), one of 40 million (3e-4) and a whole model of 7 billion (2.4e-5).
    """
    bold = UNKNOWN_SIZE["lora" if lora else "full"] if trained is None else STRIDE / sqrt(trained)
    return max(own, bold)


def hardest_contrast(groups: "Sequence[JudgedGroup]") -> str:
    """The task, as `orchestrator.buffer.tasks` names it, on which rewards differed most.

    Raises:
        CheckFailed: in no group they did.
    """
    spreads = [(pvariance([rollout.reward for rollout in judged.group.valid] or [0.0]), judged) for judged in groups]
    widest, judged = max(spreads, key=lambda pair: pair[0])
    if widest <= 0:
        raise CheckFailed("no group had rollouts of different rewards, so no task can be chosen", "see the check `reward`")
    task = judged.group.task
    name = str(task.task.get("id", task.index))
    environments = {judged.group.task.env.name for judged in groups}
    return name if len(environments) == 1 else f"{task.env.name}/{name}"


def short_config(config: RLConfig, task: str, lr: float, steps: int = STEPS) -> RLConfig:
    """The user's configuration for a few steps on one task: what it learns with stays, what only a long run needs goes."""
    settings = config.orchestrator
    most = ROLLOUTS["GPU" if config.gpus.trainer else "CPU"]
    group = min(settings.rollouts_per_example, max(2, most // FEWEST_GROUPS))
    changes: dict[str, Any] = {
        "output_dir": config.output_dir / "overfit",
        "trajectories_dir": None,
        "run_name": "overfit",
        "max_steps": steps,
        "epochs": None,
        "inference": {"port": None, "noise": None},
        "orchestrator": {
            "batch_size": group * (most // group),
            "rollouts_per_example": group,
            "max_staleness": 0,
            "max_inflight": None,
            "buffer": {"kind": "epochs", "tasks": [task]},
            "eval": {"interval": None, "num_examples": 1, "rollouts_per_example": 1, "at_start": False},
        },
        "trainer": {"optim": {"lr": lr, "schedule": "constant", "warmup_steps": 0}, "rehearse": False},
        "stop": {"success_when": None, "stop_on_success": False, "abort_when": None, "patience": None, "on_stuck": "warn"},
        "ckpt": {"interval": None},
        "monitor": {"tensorboard": False, "log_samples": 0},
        "wandb": None,
        "mlflow": None,
    }
    return changed(config, changes)


def judge_run(run: ShortRun, *, lr: float, own_lr: float, task: str, max_steps: int, look_further: str) -> Finding:
    """What a short run says about the configuration.

    Args:
        run: as it was left.
        lr: learning rate of the short run.
        own_lr: the configured one.
        task: that was played.
        max_steps: of the user's run.
        look_further: command that plays this task for longer.
    """
    moves = movement(run.rewards)
    moved = max(moves, key=lambda one: one.errors, default=None)
    data: dict[str, Any] = {
        "task": task,
        "lr": lr,
        "own_lr": own_lr,
        "rewards": run.curve,
        "gradients": [value for value in run.gradients if isfinite(value)],
        "seconds": run.seconds,
    }
    if moved is not None:
        data |= {"before": moved.before, "after": moved.after, "standard_error": moved.error}
    lines = _lines(run)

    def found(verdict: Verdict, evidence: str, remedy: str = "") -> Finding:
        return Finding(verdict, evidence, remedy, data, lines)

    if run.failure:
        return found(Verdict.FAIL, f"the short run failed: {run.failure}", "mend what its log names; it is shown below")
    if run.updates and not any(isfinite(update) and update > 0 for update in run.updates):
        norms = ", ".join(f"{norm:g}" for norm in run.gradients)
        remedy = "see the checks `gradient` and `update`; NaN points at trainer.loss, at model.dtype or at rewards that explode"
        return found(Verdict.FAIL, f"no step of {len(run.updates)} moved the weights; gradient norms {norms}", remedy)
    if moved is None:
        why = "none carried signal any more" if run.no_signal else f"that took {duration(run.seconds)}"
        evidence = f"too few steps to tell: {len(run.rewards)} on {task}, and {why}"
        return found(Verdict.WARN, evidence, f"play it for longer by yourself: {look_further}")
    seen = _seen(run, moved, task, lr, own_lr)
    if moved.errors >= RISEN:
        return found(*_risen(seen, lr=lr, own_lr=own_lr, steps=len(run.rewards), max_steps=max_steps))
    if moves[0].errors <= -FALLEN:
        seen = _seen(run, moves[0], task, lr, own_lr)
        remedy = "what is rewarded becomes less likely: see the checks `advantages`, `mask` and `rewarded`; "
        remedy += "where these pass, the updates are too large: lower trainer.optim.lr, or set trainer.loss.kl_beta"
        return found(Verdict.FAIL, f"the reward fell: {seen}", remedy)
    remedy = "this is no proof of a fault, since few rollouts are noisy and a task may be too hard for a few steps: play it for "
    remedy += f"longer ({look_further}), with more orchestrator.rollouts_per_example, or an easier task"
    return found(Verdict.WARN, f"no rise beyond noise: {seen}", remedy)


def _risen(seen: str, *, lr: float, own_lr: float, steps: int, max_steps: int) -> tuple[Verdict, str, str]:
    """It learns; but does it go as far with the configured learning rate?"""
    needed = round(steps * lr / own_lr)
    if needed <= max_steps:
        return Verdict.PASS, seen, ""
    remedy = (
        f"with trainer.optim.lr = {own_lr:g} the weights need about {needed:,} steps for the way of these {steps}, and "
        f"max_steps = {max_steps}: raise trainer.optim.lr towards {lr:.1g}, or max_steps"
    )
    return Verdict.WARN, seen, remedy


def _seen(run: ShortRun, moved: Rise, task: str, lr: float, own_lr: float) -> str:
    rate = f"trainer.optim.lr = {lr:.2g}" + (f" (yours is {own_lr:g})" if own_lr != lr else ", as configured")
    size = f"{abs(moved.errors):.1f} standard errors" if isfinite(moved.errors) else "no spread at all"
    full = "; then all rollouts were rewarded alike" if run.no_signal else ""
    first = "the first step" if moved.steps == 1 else f"the first {moved.steps} steps"
    last = "the others" if moved.steps == 1 else "the last"
    return (
        f"reward {moved.before:.3g} in {first} -> {moved.after:.3g} in {last} ({size}), {len(run.rewards)} steps on {task} alone "
        f"with {rate}, in {duration(run.seconds)}{full}"
    )


def _lines(run: ShortRun) -> tuple[str, ...]:
    curve = run.curve
    drawn = [f"reward by step  {sparkline(curve)}  {', '.join(f'{value:.2f}' for value in curve)}"] if curve else []
    return (*drawn, *run.log)


def _run(context: "Context") -> Finding:
    config, settings = context.config, context.config.orchestrator
    task = hardest_contrast(context.groups)
    own = config.trainer.optim.lr
    lora = config.trainer.model.lora
    lr = bold_learning_rate(own, trained_parameters(config, context.foreseen.shape), lora=lora is not None)
    short = short_config(config, task, lr)
    look_further = f"rl @ FILE --orchestrator.buffer.tasks '[\"{task}\"]' --trainer.optim.lr {lr:.1g} --max-steps 100"
    pace = Played.of(context.groups).seconds_for(short.orchestrator.batch_size)
    if (expected := pace * FEWEST_STEPS) > LIMIT_S:
        evidence = f"{FEWEST_STEPS} steps of {short.orchestrator.batch_size} rollouts would take {duration(expected)} or more"
        return Finding(Verdict.SKIPPED, evidence, f"by yourself: {look_further}", {"task": task, "lr": lr})
    context.end_session()  # the run starts engines of its own, which may need all of the memory
    context.say(f"overfit: a short run on {task}")
    run = play(short, run_id=context.run_id, enough=clearly_risen, limit_s=LIMIT_S, say=context.say)
    return judge_run(
        run, lr=lr, own_lr=own, task=task, max_steps=config.max_steps or settings.batch_size, look_further=look_further
    )


def trained_parameters(config: RLConfig, shape: "ModelShape | str") -> int | None:
    """Parameters that train; None where the sizes of the model are not known."""
    if isinstance(shape, str):
        return None
    lora = config.trainer.model.lora
    return shape.parameters if lora is None else shape.adapter_parameters(lora.rank, lora.target_modules)


OVERFIT = Check(
    "overfit",
    "Does the reward rise on a single task within a few steps?",
    needs=("rollouts", "reward", "update", "served"),
    run=_run,
)
