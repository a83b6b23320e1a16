"""Does a finite gradient reach every tensor that the configuration trains, and no other?"""

import math

from turnwise.diagnose.core import Finding
from turnwise.diagnose.notes import Notes
from turnwise.diagnose.probe_report import Gradient, ProbeReport
from turnwise.diagnose.trainer_checks.common import by_kind, listed, of_probe, rounded, unmeasured

HEAVY_CLIP = 0.1  # of the gradient that clipping leaves: batches with much and with little signal then move the policy alike


def judge_gradient(report: ProbeReport) -> Finding:
    """Compare what trains with what should, and look at the norms of all gradients."""
    found = report.gradient
    if found is None:
        return unmeasured(report, "the gradient")
    notes = Notes()
    _right_tensors(found, notes)
    if not notes.faults:
        _sound(found, notes)
    clipping = f"trainer.optim.max_grad_norm = {found.max_norm:g}" if found.max_norm is not None else "no clipping"
    later = ", those of the adapter's A as soon as B is not 0" if found.awake else ""
    summary = (
        f"all {found.expected:,} tensors that train get a gradient{later}; its norm over {report.setting.samples} samples is "
        f"{found.norm:.3g}, {clipping}"
    )
    data = {"norm": found.norm, "max_grad_norm": found.max_norm, "tensors": found.norms, "awake": found.awake}
    return notes.finding(summary, data, by_kind(found.awake or found.norms, "gradient norm") if notes.remedies else ())


def _right_tensors(found: Gradient, notes: Notes) -> None:
    if found.frozen:
        notes.fail(
            f"{len(found.frozen)} of {found.expected} tensors that should train are frozen: {listed(found.frozen)}",
            "something sets requires_grad = False, or leaves out layers of trainer.model.lora.target_modules",
        )
    if found.unexpected:
        notes.fail(
            f"{len(found.unexpected)} tensors train that should not: {listed(found.unexpected)}",
            "under trainer.model.lora only the adapters of target_modules train",
        )
    if found.unheld:
        notes.fail(f"the optimiser does not have {listed(found.unheld)}", "tensors were replaced after the optimiser was made")


def _sound(found: Gradient, notes: Notes) -> None:
    if not math.isfinite(found.norm):
        strange = [name for name, norm in found.norms.items() if not math.isfinite(norm)]
        notes.fail(
            f"the gradient is not finite in {len(strange)} of {found.expected} tensors: {listed(strange)}",
            'look for advantages and logprobs that are not finite; try model.dtype = "float32"',
        )
    elif found.norm == 0:
        notes.fail(
            "the gradient is exactly 0",
            "no sampled token with an advantage has a part in the loss: look at the mask, and at clip_low and clip_high",
        )
    elif dead := sorted({*found.missing, *_dead(found)}):
        notes.fail(
            f"no gradient reaches {len(dead)} of {found.expected} tensors that train: {listed(dead)}",
            "a hook, a detach or a mask keeps it from them; they would never change",
        )
    if found.stray:
        notes.fail(f"frozen tensors get a gradient: {listed(found.stray)}", "they were unfrozen after the adapters were made")
    if found.max_norm is not None and found.norm * HEAVY_CLIP > found.max_norm:
        notes.warn(
            f"clipping leaves {found.max_norm / found.norm:.2g} of it, and all batches move the policy alike",
            f"set trainer.optim.max_grad_norm to {rounded(2 * found.norm)} or so",
        )


def _dead(found: Gradient) -> list[str]:
    """Tensors whose gradient is 0 and ought not to be: that of an A is while B is, and an expert may have had no token."""
    norms = found.norms | {name: norm for name, norm in found.awake.items() if name.endswith(".lora_A")}
    return [name for name, norm in norms.items() if norm == 0 and ".experts." not in name]


GRADIENT = of_probe("gradient", "Does a gradient reach everything that trains?", ("logprobs", "advantages"), judge_gradient)
