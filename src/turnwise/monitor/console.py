"""One line about a step, for logs and terminals."""

from collections.abc import Mapping

_FIELDS = (
    ("reward", "critic/reward/mean", "{:.3f}"),
    ("loss", "actor/loss", "{:.4f}"),
    ("grad", "actor/grad_norm", "{:.3f}"),
    ("entropy", "actor/entropy", "{:.3f}"),
    ("kl", "actor/kl", "{:.4f}"),
    ("length", "response_length/mean", "{:.1f}"),
    ("lag", "staleness/max", "{:.0f}"),
    ("equal", "groups/equal_reward/share", "{:.0%}"),
    ("tok/s", "throughput/tokens_per_s", "{:.0f}"),
    ("s", "timing/step_s", "{:.1f}"),
)


def console_line(step: int, metrics: Mapping[str, float], *, max_steps: int | None = None) -> str:
    """`step 12/60 | reward 0.531 | loss 0.0123 | ...`; what was not measured is left out, evaluations come last."""
    fields = [f"step {step}" + (f"/{max_steps}" if max_steps is not None else "")]
    fields += [f"{label} {form.format(metrics[name])}" for label, name, form in _FIELDS if name in metrics]
    for name in sorted(metrics):
        if name.startswith("val-core/") and name.endswith("/mean"):
            stderr = metrics.get(name.removesuffix("mean") + "stderr")
            fields.append(f"{name} {metrics[name]:.3f}" + (f" ±{stderr:.3f}" if stderr is not None else ""))
    return " | ".join(fields)
