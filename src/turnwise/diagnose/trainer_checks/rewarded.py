"""Does an update make likelier what was rewarded, and less likely what was not?"""

from typing import Any

import msgspec

from turnwise.diagnose.core import Finding, Verdict
from turnwise.diagnose.probe_report import ProbeReport, Rewarded, Scaled
from turnwise.diagnose.trainer_checks.common import of_probe, unmeasured

SURE = 4.0  # standard deviations of rounding
LINEAR = 0.2  # of what the gradient promises, that a step of a sane length achieves
CLEAR = 2.0  # times as much must be expected, for less to be a fault
REMEDY = "the update lowers what was rewarded: look at the sign of the loss, and at which tokens it weighs"


def judge_rewarded(report: ProbeReport) -> Finding:
    """Weighed by advantages, the change must be above 0: of the update as it is, or of one of a length that can be judged."""
    found = report.rewarded
    if found is None:
        return unmeasured(report, "the effect of an update")
    data = msgspec.to_builtins(found)
    told = (
        f"one update changes logprobs by {found.positive:+.2g} nats a token where the advantage is positive "
        f"({found.positives:,} tokens) and by {found.negative:+.2g} where it is negative ({found.negatives:,}); weighed by "
        f"advantages {found.observed:+.2g}, by the gradient {found.predicted:+.2g}"
    )
    if found.scaled is not None and found.scaled.factor > 1:
        return _longer(found, found.scaled, data)
    least, scaled = SURE * found.noise, found.scaled
    if found.observed > least and found.observed < LINEAR * found.predicted:
        told += ": the update goes far beyond where the gradient points"
        return Finding(Verdict.WARN, told, "lower trainer.optim.lr", data)
    if found.observed > least:
        return Finding(Verdict.PASS, told, data=data)
    if scaled is None:
        return Finding(Verdict.FAIL, told, REMEDY, data)
    again = f"{scaled.factor:.2g} times as long it does {scaled.observed:+.2g}, by the gradient {scaled.predicted:+.2g}"
    if scaled.observed <= least:
        return Finding(Verdict.FAIL, f"{told}; {again}", REMEDY, data)
    return Finding(Verdict.WARN, f"{told}; {again}: the update goes too far", "lower trainer.optim.lr", data)


def _longer(found: Rewarded, scaled: Scaled, data: dict[str, Any]) -> Finding:
    """Of an update that drowns in rounding the longer one is judged."""
    told = (
        f"one update alone drowns in rounding; {scaled.factor:.3g} times as long it changes logprobs, weighed by advantages, by "
        f"{scaled.observed:+.2g}, and the gradient says {scaled.predicted:+.2g}"
    )
    least = SURE * found.noise
    if scaled.observed > least:
        return Finding(Verdict.PASS, told, data=data)
    if scaled.predicted < CLEAR * least:
        return Finding(Verdict.WARN, f"{told}, which is still too little to tell", "let the check play more rollouts", data)
    return Finding(Verdict.FAIL, told, REMEDY, data)


REWARDED = of_probe("rewarded", "Does a step make likelier what was rewarded?", ("advantages", "update"), judge_rewarded)
