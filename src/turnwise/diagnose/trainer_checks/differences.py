"""Is the gradient that of the loss? Finite differences know nothing of backward passes."""

import math

import msgspec

from turnwise.diagnose.core import Finding, Verdict
from turnwise.diagnose.probe_report import ProbeReport
from turnwise.diagnose.trainer_checks.common import of_probe, unmeasured

LIMITS = (1e-4, 0.05)  # relative: float64 leaves 1e-8, float32 arithmetic somewhere inside a model up to the second


def judge_differences(report: ProbeReport) -> Finding:
    """The worst of the directions decides."""
    found = report.differences
    if found is None:
        return unmeasured(report, "the agreement with finite differences")
    if found.trouble or not found.directions:
        why = found.trouble or "nothing of it trains"
        return Finding(Verdict.WARN, f"there is no small copy of this architecture to take differences of: {why}")
    usual, most = LIMITS
    worst = max(found.directions, key=lambda one: math.inf if math.isnan(one.error) else one.error)
    data = {"directions": msgspec.to_builtins(found.directions), "copy": found.copy}
    lines = tuple(f"{one.direction}: autograd {one.autograd:+.6e}, differences {one.numeric:+.6e}" for one in found.directions)
    what = f"{len(found.directions)} directional derivatives of the {report.setting.loss} loss ({found.copy})"
    if worst.error <= usual:
        told = f"{what} are those of finite differences, within {worst.error:.1g} of their size"
        return Finding(Verdict.PASS, told, data=data)
    wrong = [one for one in found.directions if not one.error <= usual]
    told = (
        f"{len(wrong)} of {what} are not those of finite differences: {worst.direction} is off by {worst.error:.2g} of its size"
    )
    if worst.error <= most:
        remedy = "perhaps float32 arithmetic in the model's own code; it is small enough to train with"
        return Finding(Verdict.WARN, told, remedy, data, lines)
    remedy = "a backward pass of the model's code or of the loss is wrong: compare another trainer.loss.kind, and another model"
    return Finding(Verdict.FAIL, told, remedy, data, lines)


DIFFERENCES = of_probe("finite-differences", "Is the gradient that of the loss?", ("gradient",), judge_differences)
