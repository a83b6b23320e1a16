"""Does an optimiser step move the weights, and does the movement survive to what engines read?"""

from collections.abc import Sequence
from statistics import median

import msgspec

from turnwise.diagnose.core import Finding
from turnwise.diagnose.notes import Notes
from turnwise.diagnose.probe_report import ProbeReport, Update
from turnwise.diagnose.trainer_checks.common import by_kind, listed, of_probe, percent, unmeasured

FEW_CHANGED = 0.05  # of the published weights; at a learning rate of 1e-5 about a tenth of a model's bfloat16 weights change
LARGE_RATIO = 0.1  # of a change to its weight; 1e-4 to 1e-3 is usual, an adapter of a small model begins with 1e-2
LITTLE_CHANGE = 0.02  # nats a token over a whole run, if all of its steps added up
EPS_SHARE = 0.5  # of an update that Adam's eps leaves


def judge_update(report: ProbeReport) -> Finding:
    """Count what changed, in float32 and as published, and compare the size of the change with that of the weights."""
    found = report.update
    if found is None:
        return unmeasured(report, "an update")
    notes = Notes()
    rate = f"learning rate {found.lr:.2g}"
    if found.after_warmup > 1:
        rate += f" (reached at step {found.after_warmup}; {found.first_lr:.2g} at step 1)"
    _moves(found, rate, notes)
    shares = [(count.steps, count.changed / max(1, found.weights)) for count in found.published]
    share = shares[0][1]
    if not notes.faults:
        _survives(found, shares, notes)
        _adds_up(report, found, notes)
    summary = (
        f"{rate}: of {found.weights:,} weights {found.changed:,} change in float32, and {found.published[0].changed:,} "
        f"({percent(share)}) in the {report.setting.published_dtype} that engines read"
    )
    if found.merged is not None:
        merged = percent(found.merged.changed / found.merged.weights)
        summary += (
            f"; the adapter adds {found.merged.ratio:.1e} of the norm of the weights under it (merged into them it would change "
            f"{merged}; engines add it apart)"
        )
    elif not report.setting.adapter:
        summary += f"; a tensor changes by {_ratio(found):.1e} of its norm"
    data = {name: value for name, value in msgspec.to_builtins(found).items() if name != "ratios"} | {"ratio": _ratio(found)}
    moved = {name: ratio for name, ratio in found.ratios.items() if ratio}
    return notes.finding(summary, data, by_kind(moved, "change / weight") if notes.remedies else ())


def _moves(found: Update, rate: str, notes: Notes) -> None:
    if not found.finite:
        notes.fail(f"{rate}: weights are not finite after one step", "lower trainer.optim.lr")
    elif found.lr == 0:
        notes.fail(f"{rate}: no step changes anything", "set trainer.optim.lr; look at warmup_steps and schedule")
    elif not found.applied:
        notes.fail(f"{rate}: the gradient was not applied, as its norm is 0 or not finite", "look at the check `gradient`")
    elif found.changed == 0:
        notes.fail(
            f"{rate}: not one of {found.weights:,} weights with a gradient changes",
            "the optimiser does not reach them, or the rate is lost in float32: raise trainer.optim.lr",
        )
    elif found.still:
        notes.fail(
            f"{rate}: {len(found.still)} tensors with a gradient do not change: {listed(found.still)}",
            "the optimiser does not have them, or the rate is lost in float32: raise trainer.optim.lr",
        )
    elif found.published[0].changed == 0:
        notes.fail(
            f"{rate}: {found.changed:,} weights change in float32, and none of those that engines read",
            "raise trainer.optim.lr, or train an adapter (trainer.model.lora), whose weights begin at 0",
        )


def _survives(found: Update, shares: Sequence[tuple[int, float]], notes: Notes) -> None:
    if shares[0][1] < FEW_CHANGED:
        later = ", ".join(f"{percent(share)} after {steps:,}" for steps, share in shares[1:])
        notes.warn(
            f"the others wait until float32 has added up enough: {later} steps in the same direction",
            "raise trainer.optim.lr, or train an adapter (trainer.model.lora), whose weights begin at 0",
        )
    if (ratio := _ratio(found)) > LARGE_RATIO:
        notes.warn(f"one step changes tensors by {ratio:.1e} of their norm, and 1e-3 is much", "lower trainer.optim.lr")
    if found.merged is not None and found.merged.ratio > LARGE_RATIO:
        notes.warn("one step makes the adapter that large, and 1e-2 of the weights is much", "lower trainer.optim.lr")
    if found.step_share < EPS_SHARE:
        notes.warn(
            f"weights move by {found.step_share:.2g} of the learning rate, since gradients are as small as Adam's eps",
            "raise trainer.optim.max_grad_norm, or lower trainer.optim.eps",
        )


def _adds_up(report: ProbeReport, found: Update, notes: Notes) -> None:
    """What a whole run can do, by the gradient alone: measured changes contain rounding."""
    effect = report.rewarded
    if effect is None or effect.predicted <= 0 or effect.scale <= 0 or found.full_steps is None:
        return
    step = effect.predicted / effect.scale
    if step * found.full_steps < LITTLE_CHANGE:
        notes.warn(
            f"a step moves logprobs by {step:.1e} nats a token, so all {found.steps:,} steps together by "
            f"{step * found.full_steps:.1e} at most: nobody will see the policy change",
            "raise trainer.optim.lr (adapters take ten times that of full fine-tuning), or take more steps",
        )


def _ratio(found: Update) -> float:
    """Median over the tensors that changed."""
    return median([ratio for ratio in found.ratios.values() if ratio] or [0.0])


UPDATE = of_probe("update", "Does a step change the weights that engines read?", ("gradient",), judge_update)
