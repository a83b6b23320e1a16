"""Do engine and trainer give the sampled tokens the same logprobs? Ratios, KL and clipping all rest on it."""

import math
from collections.abc import Sequence

import msgspec

from turnwise.diagnose.core import Finding, Verdict
from turnwise.diagnose.probe_report import Logprobs, ProbeReport, Scanned
from turnwise.diagnose.trainer_checks.common import of_probe, unmeasured

# mean |difference| a token, nats: up to the first it is rounding, beyond the second it never is. Two implementations of the 135M
# model differ by 1e-5 in float32 and by 0.05 in bfloat16 (docs/loss.md), larger models by less; other weights by 0.5 and more
LIMITS = {"float32": (1e-3, 1e-2), "float16": (0.03, 0.1), "bfloat16": (0.1, 0.3)}
EXPLAINED = 0.5  # of the difference that is left at most, where another temperature or place is its cause


def judge_logprobs(report: ProbeReport) -> Finding:
    """Compare the difference with what the type explains, and look for what would explain a larger one."""
    found = report.logprobs
    if found is None:
        return unmeasured(report, "the agreement with the engine")
    setting, gap = report.setting, found.agreement
    usual, most = LIMITS.get(setting.dtype, LIMITS["bfloat16"])
    evidence = (
        f"logprobs of {setting.tokens:,} sampled tokens differ by {gap.mean:.2g} nats on average and {gap.largest:.2g} at most, "
        f"KL {gap.kl:.2g}, correlation {gap.correlation:.4f}; rounding in {setting.dtype} explains up to {usual:g}"
    )
    data = {"agreement": msgspec.to_builtins(gap), "limits": [usual, most]}
    if gap.mean <= usual and setting.dropout > 0:
        remedy = "set trainer.model.lora.dropout = 0"
        told = f"{evidence}. With trainer.model.lora.dropout = {setting.dropout} the passes that train differ by more"
        return Finding(Verdict.WARN, told, remedy, data)
    if gap.mean <= usual:
        return Finding(Verdict.PASS, evidence, data=data)
    cause, remedy = explain(found, setting.temperature)
    surely = bool(cause) or not gap.mean <= most
    told = f"{evidence}: {cause}" if cause else evidence
    return Finding(Verdict.FAIL if surely else Verdict.WARN, told, remedy, data, _lines(found))


def explain(found: Logprobs, temperature: float) -> tuple[str, str]:
    """What would make the two agree, and what to do; without a cause where nothing would."""
    engine, trainer = (_fitting(found.temperatures, side, temperature) for side in ("engine", "trainer"))
    if trainer is not None and engine is None:
        cause = f"the trainer's are those of temperature {trainer:g}, the engine's those of the configured {temperature:g}"
        return cause, "the trainer must divide its logits by orchestrator.sampling.temperature, as the engine does"
    if engine is not None and trainer is None:
        cause = f"the engine's are those of temperature {engine:g}, the trainer's those of the configured {temperature:g}"
        return cause, (
            "the engine ignores orchestrator.sampling.temperature, or returns logprobs from before it is applied (vLLM must run "
            "with logprobs_mode = processed_logprobs)"
        )
    if engine is not None and trainer is not None:
        cause = f"they are those of temperatures {engine:g} (engine) and {trainer:g} (trainer), and {temperature:g} is configured"
        return cause, "something changes orchestrator.sampling.temperature on its way to both"
    shift = min(found.shifts, key=lambda row: row.engine)
    (unshifted,) = (row for row in found.shifts if row.value == 0)
    if shift.engine < EXPLAINED * unshifted.engine:
        side = "next" if shift.value > 0 else "previous"
        return (
            f"the recorded ones are those of the {side} token",
            "tokens and logprobs are shifted against each other on their way",
        )
    return "", (
        "compare what both sides load: model.name, model.dtype, quantised weights; look for top_p or top_k; if both are right, "
        'trainer.loss.importance_sampling = "truncate" corrects for a mismatch'
    )


def _fitting(rows: Sequence[Scanned], side: str, temperature: float) -> float | None:
    """A temperature that fits a side far better than the configured one; None when that one fits, or none does."""
    gaps = {row.value: float(getattr(row, side)) for row in rows}
    configured = min(gaps, key=lambda value: abs(value - temperature))
    best = min(gaps, key=gaps.__getitem__)
    return best if not math.isclose(best, configured) and gaps[best] < EXPLAINED * gaps[configured] else None


def _lines(found: Logprobs) -> tuple[str, ...]:
    return tuple(
        f"temperature {row.value:<6g} of the model's logits: engine {row.engine:.4f} nats away, trainer {row.trainer:.4f}"
        for row in found.temperatures
    )


LOGPROBS = of_probe(
    "logprobs", "Do engine and trainer agree on the sampled tokens?", ("rollouts", "reward", "mask"), judge_logprobs
)
